"""A tiny trained-enough bundle and a data set on disk, for the tests of evaluation, prediction and reports."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ntpseg.data import Record, prepare, read_image, read_mask

SIDE = 32
TEXTS = ("The left square.", "The right square.", 'Nothing, "really".')


def write_dataset(folder: Path, count: int = 12) -> list[Record]:
    """Images of two bright squares on noise, of different sizes; the sentence says which one is meant."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(count):
        height, width = (40, 56) if i % 2 else (48, 48)
        pixels = rng.integers(0, 60, (height, width)).astype(np.uint8)
        top, size = int(rng.integers(4, 20)), int(rng.integers(10, 16))
        masks = [np.zeros((height, width), bool) for _ in TEXTS]
        masks[0][top : top + size, 4 : 4 + size] = True
        masks[1][top : top + size, width - 4 - size : width - 4] = True
        pixels[masks[0] | masks[1]] += 150
        for n, text in enumerate(TEXTS[: 3 if i % 4 == 0 else 2]):
            image, mask = folder / "img" / f"p{i}_{n}.png", folder / "labelcol" / f"p{i}_{n}.png"
            for path, array in ((image, pixels), (mask, masks[n].astype(np.uint8) * 255)):
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
            split = "test" if i % 3 == 0 else "val" if i % 6 == 1 else "train"
            records.append(Record(image, mask, text, split, f"p{i}/{n}", f"p{i}"))
    return records


def make_bundle(records: list[Record], k: int = 2, steps: int = 60) -> Any:
    """Train both tokenizers and a model for a few seconds: masks come out related to the truth, far from perfect."""
    from ntpseg.models import Bundle, NTPSegModel, preset_config
    from ntpseg.tokenizers.compact import CompactVQOptions
    from ntpseg.tokenizers.compact_training import train_compact_vq
    from ntpseg.tokenizers.sequence import SequenceFormat
    from ntpseg.tokenizers.text import encode_text, train_text_tokenizer
    from ntpseg.tokenizers.vocabulary import Vocabulary

    torch.manual_seed(0)
    pairs = [prepare(read_image(r.image), read_mask(r.mask), SIDE, 1) for r in records]  # type: ignore[arg-type]
    images = torch.from_numpy(np.stack([image for image, _ in pairs]))
    masks = torch.from_numpy(np.stack([mask for _, mask in pairs]))  # type: ignore[arg-type]
    options = CompactVQOptions(image_codes=32, mask_codes=24, width=8, steps=5, codebook_steps=2)
    vision = train_compact_vq(images, masks, options, progress=False)
    text = train_text_tokenizer([r.text for r in records], 280)
    sequence = SequenceFormat(Vocabulary(len(text), 32, 24), vision.image_grid, vision.mask_grid)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    model = NTPSegModel(preset_config("tiny", sequence, overrides=small, num_heads_k=k, grid_positions=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    codes, targets = vision.encode_image(images).numpy(), vision.encode_mask(masks).numpy()
    rows = [sequence.build(encode_text(text, r.text), codes[i], targets[i]) for i, r in enumerate(records)]
    longest = max(len(ids) for ids, _ in rows)
    ids = np.full((len(rows), longest), sequence.vocabulary.pad)
    labels = np.full((len(rows), longest), -100)
    for i, (a, b) in enumerate(rows):
        ids[i, : len(a)], labels[i, : len(b)] = a, b
    batch = [torch.from_numpy(x) for x in (ids, labels, sequence.grid_ids(ids))]
    for _ in range(steps):
        loss = model(batch[0], labels=batch[1], grid_ids=batch[2]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Bundle(model.eval(), text, vision, sequence)


@functools.cache
def shared() -> tuple[list[Record], Any, Path]:
    """Records, bundle and run directory that several tests read; nothing of it may be changed."""
    folder = Path(tempfile.mkdtemp(prefix="ntpseg-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    records = write_dataset(folder / "data")
    bundle = make_bundle(records)
    run = folder / "run"
    bundle.save_pretrained(run / "model")
    write_manifest(folder / "data.csv", records)
    (run / "config.yaml").write_text(f"data:\n  path: {folder / 'data.csv'}\n  layout: auto\n", encoding="utf-8")
    log = [{"step": s, "epoch": s / 9, "loss": 3 / s, "ntp": 2 / s, "tcl": 1 / s, "het": 0.0} for s in range(1, 40)]
    log += [{"step": s, "epoch": s / 9, "eval_loss": 3.5 / s} for s in (10, 20, 30)]
    (run / "trainer_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log), encoding="utf-8")
    return records, bundle, run


def write_manifest(path: Path, records: list[Record]) -> None:
    """The records as a plain CSV manifest."""
    from ntpseg.utils.files import write_csv

    rows = [[r.image, r.mask, r.text, r.split, r.case, r.subject] for r in records]
    write_csv(path, ["image", "mask", "text", "split", "case", "subject"], rows)
