"""Operands of the loss from a trained model, and what gradient filtering skips and costs on them.

The softmax over the mask codes is cut into tiles of (rows, classes); a tile whose every probability is below the
threshold, and that holds no target, is one that the filter leaves out of both backward products.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import relative_error
from benchmarks.operands import HARD_TOKENS, IGNORE_INDEX, Operands, Shape
from ntpseg import HardTokens

SAMPLES = 32
GRADIENT_FILTER = 2.0**-12
TILES = ((128, 128), (128, 64), (128, 1), (1, 1))


@torch.no_grad()
def trained_operands(run: Path, samples: int = SAMPLES) -> Operands:
    """Hidden states of all heads on a run's own validation tokens, the matrix of the supervised codes and their labels.

    Args:
        run: the directory of a finished training.
        samples: at most so many, evenly spread over the split.

    Raises:
        ValueError: the heads of the run have an output matrix each.
    """
    from ntpseg.models.bundle import Bundle
    from ntpseg.tokenizers.cache import TokenCache
    from ntpseg.training.dataset import Collator, TokenDataset

    bundle = Bundle.from_pretrained(run / "model" if (run / "model").exists() else run)
    caches = [TokenCache.open(run / "cache", path.name) for path in sorted((run / "cache").iterdir()) if path.is_dir()]
    data = TokenDataset(min(caches, key=len), bundle.sequence, augmented=False)  # the smaller: the validation split
    model = bundle.model.eval()
    collate = Collator(bundle.sequence, grid_ids=model.config.grid_positions > 0)
    batch = collate([data[index] for index in range(0, len(data), max(len(data) // samples, 1))][:samples])
    if model.heads.weight.dim() != 2:
        raise ValueError(f"run must share one output matrix between its heads, got {list(model.heads.weight.shape)}")
    out = model(batch["input_ids"], grid_ids=batch.get("grid_ids"), attention_mask=batch.get("attention_mask"))
    low, high = bundle.sequence.vocabulary.supervised_range
    hidden = model.heads(out.last_hidden_state).detach().float()
    weight = model.heads.weight.detach()[low:high].float().contiguous()
    labels = torch.as_tensor(batch["labels"])
    labels = (labels - low).masked_fill(labels == IGNORE_INDEX, IGNORE_INDEX)
    size = Shape(
        rows=int((labels[:, 1:] != IGNORE_INDEX).sum()),
        width=hidden.shape[-1],
        classes=high - low,
        heads=hidden.shape[2],
        logits="trained",
        dtype="float32",
    )
    return Operands(size, hidden, weight, labels, _random_hard_tokens(labels, high - low))


def _random_hard_tokens(labels: Tensor, classes: int) -> HardTokens:
    generator = torch.Generator().manual_seed(0)
    # unsupervised positions sort behind all others
    order = torch.rand(labels.shape, generator=generator).masked_fill(labels == IGNORE_INDEX, 2.0).argsort(1)
    position = order[:, :HARD_TOKENS]
    return HardTokens(position, torch.randint(0, classes, position.shape, generator=generator))


def filter_facts(operands: Operands, exact: dict[str, Any], filtered: dict[str, Any]) -> dict[str, Any]:
    """The share of tiles that the filter skips, and the relative error of its gradients.

    Args:
        operands: that both were computed on.
        exact, filtered: results of one step of `benchmarks.loss.ours`.
    """
    errors = {"d_hidden": relative_error(filtered["hidden"], exact["hidden"].double())}
    errors["d_weight"] = relative_error(filtered["d_weight"], exact["d_weight"].double())
    skipped = skipped_tiles(operands, GRADIENT_FILTER, TILES)
    return {"threshold": GRADIENT_FILTER, "skipped_share_of_tiles": skipped, "relative_error": errors}


def skipped_tiles(operands: Operands, threshold: float, tiles: Sequence[tuple[int, int]]) -> dict[str, float]:
    """By tile, such as "128x64" rows and classes, the share of tiles that is left out of the backward products."""
    needed = (operands.rows @ operands.weight.t()).softmax(1) >= threshold
    needed[torch.arange(len(needed)), operands.target] = True
    return {
        f"{height}x{width}": 1 - float(F.max_pool2d(needed[None].float(), (height, width), ceil_mode=True).mean())
        for height, width in tiles
    }
