"""The attention of a run: checked before anything is prepared, chosen once, and kept in the run's directory."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ntpseg.models.attention import AttentionUse, implementation, obstacle
from ntpseg.models.attention_choice import CANDIDATES, AttentionChoice, choose_attention
from ntpseg.models.presets import PRESETS
from ntpseg.tokenizers.pixel_cache import PixelSource
from ntpseg.tokenizers.text import encode_text
from ntpseg.training.arguments import DEFAULTS
from ntpseg.training.hardware import resolve_bf16
from ntpseg.utils.files import write_json

if TYPE_CHECKING:
    from ntpseg.training.config import RunConfig
    from ntpseg.training.preparation import Prepared

ATTENTION = "attention.json"
# Sentences that are looked at for the length of a sequence, whose power of two alone counts.
_SENTENCES = 64


def check_attention(config: RunConfig) -> None:
    """Refuse ``model.attention`` where it is unknown or cannot run on this machine.

    Raises:
        ValueError: says why, and what to install or set.
    """
    if config.model.attention not in (None, "auto"):
        implementation(config.model.attention, training_use(config))


def training_use(config: RunConfig, prepared: Prepared | None = None) -> AttentionUse:
    """What attention a training has to compute; without the prepared run its shapes are 1."""
    fields = {**DEFAULTS, **config.training}
    cpu = fields.get("use_cpu") or not torch.cuda.is_available()
    dtype = torch.float32
    if fields.get("fp16"):
        dtype = torch.float16
    elif resolve_bf16(fields["bf16"]):
        dtype = torch.bfloat16
    text = {**PRESETS[config.model.preset], **config.model.overrides}
    heads = text["num_attention_heads"]
    return AttentionUse(
        device=torch.device("cpu" if cpu else "cuda"),
        dtype=dtype,
        batch=1 if prepared is None else fields["per_device_train_batch_size"],
        heads=heads,
        length=1 if prepared is None else longest_sequence(prepared),
        width=text.get("head_dim") or text["hidden_size"] // heads,
        kv_heads=text["num_key_value_heads"],
        prefix=config.model.prefix_lm,
        dropout=float(text.get("attention_dropout", 0.0)),
        packing=config.data.packing,
    )


def longest_sequence(prepared: Prepared) -> int:
    """Tokens of the longest of some training sequences, spread evenly over the split."""
    training, sequence = prepared.training, prepared.sequence
    pairs = len(training) if isinstance(training, PixelSource) else len(training.image_codes)
    chosen = sorted({i * pairs // _SENTENCES for i in range(_SENTENCES)})
    codes = None if sequence.image_grid is None else np.zeros(sequence.image_grid, np.int64)
    longest = 0
    for index in chosen:
        if isinstance(training, PixelSource):
            ids = encode_text(prepared.text, training.text(index))
        else:
            ids = list(training.text_ids(index))
        longest = max(longest, len(ids))
    return len(sequence.prompt([0] * longest, codes)) + sequence.num_target


def run_attention(config: RunConfig, prepared: Prepared, run: Path, *, rank: int = 0) -> AttentionChoice:
    """The choice for a run, which all ranks make together; rank 0 writes it to ``RUN/attention.json``.

    A run that goes on keeps what it began with, whatever ``auto`` would choose by now.

    Raises:
        ValueError: ``model.attention`` is unknown or cannot run on this machine.
    """
    name, path = config.model.attention, run / ATTENTION
    use = training_use(config, prepared)
    kept = _kept(path, use) if name == "auto" else None
    choice = choose_attention(name if kept is None else kept, use)
    if kept is not None:
        choice = replace(choice, source="kept")
    if rank == 0:
        write_json(path, {"asked": name, **choice.to_dict()})
        if name == "auto":
            times = ", ".join(f"{key} {value:.3g} ms" for key, value in choice.milliseconds.items())
            shown = f"{choice.source}: {times}" if times else choice.source
            print(f"attention: {choice.attention} ({shown})", file=sys.stderr)
    return choice


def _kept(path: Path, use: AttentionUse) -> str | None:
    try:
        entry: Any = json.loads(path.read_text(encoding="utf-8"))
        if entry["asked"] == "auto" and entry["attention"] in CANDIDATES and not obstacle(entry["attention"], use):
            return entry["attention"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a run that has just begun, or one of before
    return None
