"""Toy pairs as pixels: a pixel cache, a tokenizer that needs no training, and a trainer with a stem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from toy import SMALL
from transformers import TrainingArguments

from ntpseg.data import Augmentation, Record
from ntpseg.models import NTPSegModel, preset_config
from ntpseg.tokenizers.pixel_cache import PixelCache
from ntpseg.tokenizers.sequence import SequenceFormat
from ntpseg.tokenizers.text import train_text_tokenizer
from ntpseg.tokenizers.vocabulary import Vocabulary
from ntpseg.training import NTPSegTrainer
from ntpseg.training.config import OptimizerConfig
from ntpseg.training.pixel_dataset import PixelCollator, PixelDataset

SIDE, FACTOR = 24, 8
GRID = (SIDE // FACTOR,) * 2
TEXTS = ("The left disc.", "The right disc, which is bright.")
MUON = OptimizerConfig(name="muon", muon_learning_rate=0.02, ema=0.9)
AUGMENTATION = Augmentation(flip=0.5)
MASK_INPUTS = {"replaced": 1.0, "draft": 0.7, "blank": 0.3, "second_pass": 0.5}


class Quadrants:
    """A vision tokenizer: which of the four quadrants of a patch are foreground; an image is coded likewise."""

    image_size, channels, factor = SIDE, 1, FACTOR
    image_grid = mask_grid = GRID
    image_codes = mask_codes = 16
    shared_codebook = False

    def encode_mask(self, x: Tensor) -> Tensor:
        quarters = torch.nn.functional.avg_pool2d(x, FACTOR // 2) >= 0.5
        return sum(quarters[:, 0, i::2, j::2].long() << (2 * i + j) for i in (0, 1) for j in (0, 1))  # type: ignore[return-value]

    def encode_image(self, x: Tensor) -> Tensor:
        return self.encode_mask((x > 0).float())

    def mask_patches(self) -> Tensor:
        bits = (torch.arange(16)[:, None] >> torch.arange(4)) & 1
        return bits.view(16, 2, 2).float().repeat_interleave(FACTOR // 2, 1).repeat_interleave(FACTOR // 2, 2)

    def decode_mask(self, codes: Tensor) -> Tensor:
        patches = self.mask_patches()[codes]
        return patches.permute(0, 1, 3, 2, 4).reshape(len(codes), 1, SIDE, SIDE)


def write_records(folder: Path, count: int = 16) -> list[Record]:
    """Discs of different sizes on noise, left or right as the sentence says."""
    rng, records = np.random.default_rng(0), []
    y, x = np.mgrid[:SIDE, :SIDE]
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        centre, radius = 6 + 12 * (i % 2), rng.integers(4, 6)
        disc = (y - rng.integers(7, 17)) ** 2 + (x - centre) ** 2 <= radius**2
        image, mask = folder / f"i{i}.png", folder / f"m{i}.png"
        Image.fromarray((rng.integers(0, 60, (SIDE, SIDE)) + 150 * disc).astype(np.uint8)).save(image)
        Image.fromarray((255 * disc).astype(np.uint8)).save(mask)
        records.append(Record(image, mask, TEXTS[i % 2], "train", f"c{i}", f"s{i}"))
    return records


def make_cache(folder: Path, count: int = 16) -> PixelCache:
    return PixelCache.build(folder / "cache", write_records(folder / "data", count), SIDE, 1, progress=False)


def make_parts(front_end: str = "features") -> tuple[SequenceFormat, PixelCollator]:
    text = train_text_tokenizer(list(TEXTS), 280)
    codes = 16 if front_end == "both" else 0
    sequence = SequenceFormat(Vocabulary(len(text), codes, 16), GRID if codes else None, GRID)
    return sequence, PixelCollator(sequence, text, Quadrants())


def make_trainer(
    cache: PixelCache,
    output: Path,
    *,
    mask_inputs: dict[str, Any] | None = None,
    optimizer: OptimizerConfig | None = MUON,
    callbacks: list[Any] | None = None,
    evaluate: bool = False,
    **fields: Any,
) -> NTPSegTrainer:
    sequence, collator = make_parts()
    torch.manual_seed(0)
    config = preset_config(
        "tiny",
        sequence,
        overrides={**SMALL, "hidden_size": 32, "intermediate_size": 48},
        num_heads_k=1,
        negatives=0,
        het_weight=0.0,
        grid_positions=True,
        front_end="features",
        stem={"widths": [8, 16, 16], "group_size": 4, "caption_dim": 8, "caption_hidden": 8},
        image_size=SIDE,
        patch_size=FACTOR,
        mask_inputs=mask_inputs,
        dense_loss={"dice": 0.5, "pixel": 1.0, "soft": 0.25},
    )
    model = NTPSegModel(config)
    model.readout.set_patches(Quadrants().mask_patches())
    fields = {
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "prediction_loss_only": True,
        "seed": 0,
        **fields,
    }
    return NTPSegTrainer(
        model,
        TrainingArguments(output_dir=str(output), **fields),
        train_dataset=PixelDataset(cache, AUGMENTATION, seed=0),
        eval_dataset=PixelDataset(cache, seed=0) if evaluate else None,
        data_collator=collator,
        optimizer_options=optimizer,
        callbacks=callbacks,
    )
