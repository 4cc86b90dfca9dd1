"""Toy pairs without any tokenizer to train: discs and squares, every distinct 4x4 mask patch a code of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments

from ntpseg.memory import HardTokenMemory
from ntpseg.models import NTPSegModel, preset_config
from ntpseg.tokenizers.sequence import SequenceFormat
from ntpseg.tokenizers.vocabulary import Vocabulary
from ntpseg.training import Collator, NTPSegTrainer, TokenDataset

SIDE, PATCH = 32, 4
GRID = SIDE // PATCH
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


@dataclass
class Toy:
    image_codes: np.ndarray
    mask_codes: np.ndarray
    texts: list[list[str]]
    masks: np.ndarray
    patches: np.ndarray

    def text_ids(self, index: int, variant: int = 0) -> list[int]:
        """One id per byte."""
        return list(self.texts[index][variant].encode())

    def prefetch(self, indices: Sequence[int]) -> None:
        """Nothing."""

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Masks [N, SIDE, SIDE] of codes [N, GRID, GRID]."""
        blocks = self.patches[codes].reshape(len(codes), GRID, GRID, PATCH, PATCH)
        return blocks.transpose(0, 1, 3, 2, 4).reshape(len(codes), SIDE, SIDE)


def make_toy(pairs: int = 8, variants: int = 0, seed: int = 0) -> Toy:
    """Each image holds a disc and a square; the sentence says which of them the mask is."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    images, masks, texts = [], [], []
    for n in range(pairs * (1 + variants)):
        cy, cx, r = *rng.integers(8, 24, 2), rng.integers(4, 7)
        sy, sx, s = *rng.integers(2, 20, 2), rng.integers(5, 10)
        disc = (y - cy) ** 2 + (x - cx) ** 2 <= r * r
        square = (y >= sy) & (y < sy + s) & (x >= sx) & (x < sx + s)
        images.append(np.maximum(disc * 1.0, square * 0.5))
        masks.append(disc if n % 2 else square)
        texts.append("the disc" if n % 2 else "the square")
    cut = lambda a: np.stack(a).reshape(-1, GRID, PATCH, GRID, PATCH).swapaxes(2, 3).reshape(-1, PATCH * PATCH)  # noqa: E731
    levels = np.rint(cut(images).mean(1) * 15).astype(np.int64)
    patches, codes = np.unique(cut(masks), axis=0, return_inverse=True)
    shape = (pairs, 1 + variants, GRID, GRID)
    rows = [texts[i * (1 + variants) : (i + 1) * (1 + variants)] for i in range(pairs)]
    return Toy(levels.reshape(shape), codes.reshape(shape), rows, np.stack(masks), patches)


def sequence_of(toy: Toy) -> SequenceFormat:
    return SequenceFormat(Vocabulary(256, 16, len(toy.patches)), (GRID, GRID), (GRID, GRID))


def make_trainer(
    toy: Toy,
    output: Path,
    *,
    k: int = 2,
    hard_tokens: int = 4,
    memory_options: dict[str, Any] | None = None,
    model_options: dict[str, Any] | None = None,
    overrides: dict[str, Any] | None = None,
    callbacks: list[Any] | None = None,
    evaluate: bool = False,
    construct: Callable[[Any, TrainingArguments], Any] | None = None,
    trainer_options: dict[str, Any] | None = None,
    **fields: Any,
) -> NTPSegTrainer:
    sequence = sequence_of(toy)
    torch.manual_seed(0)
    config = preset_config(
        "tiny",
        sequence,
        overrides={**SMALL, **(overrides or {})},
        num_heads_k=k,
        **{"grid_positions": True, **(model_options or {})},
    )
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
        "ddp_find_unused_parameters": False,
        "seed": 0,
        **fields,
    }
    args = TrainingArguments(output_dir=str(output), **fields)
    return NTPSegTrainer(
        NTPSegModel(config) if construct is None else construct(config, args),
        args,
        train_dataset=TokenDataset(toy, sequence),
        eval_dataset=TokenDataset(toy, sequence, augmented=False) if evaluate else None,
        data_collator=Collator(sequence),
        memory=HardTokenMemory(len(toy.image_codes), hard_tokens, **(memory_options or {})) if hard_tokens else None,
        hard_token_sync_steps=1,
        callbacks=callbacks,
        **(trainer_options or {}),
    )


def losses(trainer: NTPSegTrainer, *names: str) -> list[tuple[float, ...]]:
    """The named figures of every training log."""
    names = names or ("loss",)
    return [tuple(line[n] for n in names) for line in trainer.state.log_history if "loss" in line]


def descend(trainer: NTPSegTrainer) -> None:
    """Let each evaluation be better than the one before, whatever the model."""
    evaluate = trainer.evaluation_loop

    def loop(*args, **kwargs):
        output = evaluate(*args, **kwargs)
        output.metrics["eval_loss"] = 100.0 - trainer.state.global_step
        return output

    trainer.evaluation_loop = loop  # type: ignore[method-assign]
