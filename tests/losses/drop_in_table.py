"""What `fuse_causal_lm` does with each causal language model of transformers, found by trying; writes docs/drop-in.md.

python tests/losses/drop_in_table.py
"""

from __future__ import annotations

import copy
import re
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_causal_lms import VOCABULARY, build, causal_lm_classes
from torch import Tensor, nn

from ntpseg.losses.deferred_logits import CannotFuse
from ntpseg.losses.huggingface import fuse_causal_lm

EQUAL, REFUSED, NOT_BUILT, DIFFERENT = "equal", "refused", "not built", "different"
PAGE = Path(__file__).parents[2] / "docs" / "drop-in.md"
_START = "<!-- table: python tests/losses/drop_in_table.py -->"


@dataclass(frozen=True)
class Row:
    """One class of models.

    Attributes:
        model: its name.
        verdict: one of the words above.
        reason: why, where it is not equal.
    """

    model: str
    verdict: str
    reason: str = ""


def classify(config_class: Any, model_class: Any) -> Row:
    """Trains one step each way, both in training mode with the same random numbers, and compares all gradients."""
    name = model_class.__name__
    try:
        model = build(config_class, model_class)
        with torch.no_grad():  # some models put in other modules in their first call
            model.eval()(input_ids=torch.ones(2, 16, dtype=torch.int64) * 7)
        truth = _step(copy.deepcopy(model.train()))
        if _difference(_step(copy.deepcopy(model)), truth):  # it seeds its own random numbers
            truth = _step(copy.deepcopy(model.eval()))
    except Exception as error:
        return Row(name, NOT_BUILT, _short(error))
    try:
        found = _step(fuse_causal_lm(model, negatives=0))
    except ValueError as error:
        return Row(name, REFUSED, _short(error))
    difference = _difference(found, truth)
    return Row(name, DIFFERENT, difference) if difference else Row(name, EQUAL)


def _step(model: nn.Module) -> dict[str, Tensor]:
    """The loss and the gradients of all parameters."""
    torch.manual_seed(1)
    ids = torch.randint(3, VOCABULARY - 9, (2, 16))
    labels = ids.clone()
    labels[:, :4] = -100
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model(input_ids=ids, labels=labels)
        out["loss"].backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    router = out.get("aux_loss")
    more = {} if router is None else {"the auxiliary loss": torch.as_tensor(router).detach()}
    return {"the loss": out["loss"].detach()} | more | grads


def _difference(found: dict[str, Tensor], truth: dict[str, Tensor]) -> str:
    """The first tensor that is missing or differs, "" if none does."""
    if not torch.isfinite(truth["the loss"]):
        return "its own loss is not finite"
    largest = max(float(value.norm()) for name, value in truth.items() if not name.startswith("the "))
    for name in sorted(found.keys() | truth.keys(), key=lambda name: not name.startswith("the ")):
        if name not in found or name not in truth:
            return f"{name} has a value on one side only"
        error = float((found[name] - truth[name]).norm())
        if not error <= 1e-4 * float(truth[name].norm()) + 1e-6 * (1 + largest):
            return f"{name} differs by {error:.3g} of {float(truth[name].norm()):.3g}"
    return ""


def _short(error: Exception) -> str:
    line = str(error) if isinstance(error, CannotFuse) else f"{type(error).__name__}: {error}"
    line = " ".join(line.split()).replace("|", "/")
    return line if len(line) <= 240 else line[:237] + "..."


def committed() -> tuple[str, dict[str, str]]:
    """The version of transformers that the page was written with, and the verdict of each model on it."""
    text = PAGE.read_text()
    version = re.search(r"^With transformers (\d[\w.]*\w):", text, re.MULTILINE)
    assert version is not None
    rows = re.findall(r"^\| `(\w+)` \| ([a-z ]+) \|", text, re.MULTILINE)
    return version[1], dict(rows)


def page(rows: list[Row]) -> str:
    """docs/drop-in.md: what is above the table stays as it is there."""
    counts = Counter(row.verdict for row in rows)
    numbers = ", ".join(f"{counts[verdict]} {verdict}" for verdict in (EQUAL, REFUSED, NOT_BUILT, DIFFERENT))
    lines = [
        PAGE.read_text().split(_START)[0] + _START,
        "",
        f"With transformers {transformers.__version__}: {numbers}.",
        "",
        "| Model | Verdict | Reason |",
        "| --- | --- | --- |",
        *(f"| `{row.model}` | {row.verdict} | {row.reason} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    rows = []
    for config_class, model_class in causal_lm_classes():
        begin = time.perf_counter()
        rows.append(classify(config_class, model_class))
        seconds = time.perf_counter() - begin
        print(f"{rows[-1].model:40} {rows[-1].verdict:10} {seconds:5.1f} s  {rows[-1].reason}", flush=True)
    PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
