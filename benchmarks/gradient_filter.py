"""How much gradient filtering skips on the mask tokens of a trained model, and what it costs in accuracy.

    python benchmarks/gradient_filter.py RUN [--samples 32] [--threshold 0.000244140625]

RUN is the directory of a finished training. Its own validation tokens go through the model once; the softmax over
its mask codes is then cut into tiles of (rows, classes), and a tile whose every probability is below the
threshold, and that holds no target, is one that the filter leaves out of both backward products.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
from loss_cpu_gate import commit, cpu_name

from ntpseg import ntp_loss
from ntpseg.losses import LossOptions
from ntpseg.losses.compaction import compact
from ntpseg.losses.supervision import Supervision
from ntpseg.models.bundle import Bundle
from ntpseg.tokenizers.cache import TokenCache
from ntpseg.training.dataset import Collator, TokenDataset


@torch.no_grad()
def states(run: Path, samples: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, int]]:
    """Hidden states of all heads, the output matrix, labels and the range of mask codes."""
    bundle = Bundle.from_pretrained(run / "model" if (run / "model").exists() else run)
    caches = [TokenCache.open(run / "cache", path.name) for path in sorted((run / "cache").iterdir()) if path.is_dir()]
    cache = min(caches, key=len)  # the smaller of the two: the validation split
    data = TokenDataset(cache, bundle.sequence, augmented=False)
    collate = Collator(bundle.sequence, grid_ids=bundle.model.config.grid_positions > 0)
    step = max(len(data) // samples, 1)
    batch = collate([data[index] for index in range(0, len(data), step)][:samples])
    model = bundle.model.eval()
    out = model(batch["input_ids"], grid_ids=batch.get("grid_ids"), attention_mask=batch.get("attention_mask"))
    hidden = model.heads(out.last_hidden_state)
    return hidden.float(), model.heads.weight.float(), batch["labels"], bundle.sequence.vocabulary.supervised_range


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--threshold", type=float, default=2.0**-12)
    parser.add_argument("--tiles", nargs="+", default=["128x128", "128x64", "128x1", "1x1"])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gradient_filter.json")
    settings = parser.parse_args()
    hidden, weight, labels, (low, high) = states(settings.run, settings.samples)
    options = LossOptions(vocab_range=(low, high), backend="torch")
    rows = compact(hidden, Supervision(labels), high - low, options, per_head_weight=weight.dim() == 3).rows
    matrix = weight[low:high] if weight.dim() == 2 else weight[0, low:high]
    needed = (rows.hidden @ matrix.t()).softmax(1) >= settings.threshold
    needed[torch.arange(len(needed)), rows.target] = True
    skipped = {}
    for tile in settings.tiles:
        height, width = (int(size) for size in tile.split("x"))
        live = torch.nn.functional.max_pool2d(needed[None].float(), (height, width), ceil_mode=True)
        skipped[tile] = float(1 - live.mean())
    gradients = []
    for threshold in (0.0, settings.threshold):
        leaves = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
        filtered = LossOptions(vocab_range=(low, high), backend="torch", gradient_filter=threshold)
        ntp_loss(*leaves, labels, options=filtered).loss.backward()
        gradients.append([leaf.grad for leaf in leaves])
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(*gradients, strict=True)]
    report = {
        "benchmark": "gradient_filter",
        "rows": len(rows.target),
        "classes": high - low,
        "threshold": settings.threshold,
        "skipped_share_of_tiles": skipped,
        "relative_error": dict(zip(("d_hidden", "d_weight"), errors, strict=True)),
        "commit": commit(),
        "device": cpu_name(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    print(json.dumps(report, indent=1))
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    partial = settings.output.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(settings.output)


if __name__ == "__main__":
    main()
