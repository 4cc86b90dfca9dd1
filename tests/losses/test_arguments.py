"""Every bad argument is refused by a ValueError that names it."""

from __future__ import annotations

import pytest
import torch

from ntpseg import HardTokens, NTPLoss, NumItems, ntp_loss
from ntpseg.losses import LossOptions

HIDDEN = torch.zeros(2, 5, 3, 4)
WEIGHT = torch.zeros(7, 4)
LABELS = torch.zeros(2, 5, dtype=torch.int64)
SLOTS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("start", "arguments"),
    [
        ("hidden must", {"hidden": torch.zeros(2, 5)}),
        ("hidden must", {"hidden": HIDDEN.long()}),
        ("hidden must", {"hidden": torch.zeros(2, 5, 0, 4)}),
        ("weight must", {"weight": torch.zeros(7, 5)}),
        ("weight must", {"weight": torch.zeros(0, 4)}),
        ("weight must", {"weight": torch.zeros(2, 7, 4)}),
        ("weight must", {"weight": torch.zeros(4)}),
        ("weight must", {"weight": WEIGHT.int()}),
        ("labels must", {"labels": LABELS[:1]}),
        ("labels must", {"labels": LABELS.float()}),
        ("labels must be ignore_index or in \\[0, 7\\), got 7", {"labels": LABELS + 7}),
        ("labels must be ignore_index or in \\[0, 7\\), got -1", {"labels": LABELS - 1}),
        ("labels must be ignore_index or in \\[2, 5\\), got 0", {"vocab_range": (2, 5)}),
        ("negatives must", {"negatives": -1}),
        ("negatives must", {"negatives": 2.0}),
        ("tcl_weight must", {"tcl_weight": -1.0}),
        ("tcl_weight must", {"tcl_weight": float("nan")}),
        ("het_weight must", {"het_weight": float("inf")}),
        ("temperature must", {"temperature": 0.0}),
        ("head_weights must", {"head_weights": [1.0]}),
        ("head_weights must", {"head_weights": [1.0, -1.0, 0.0]}),
        ("head_weights must", {"head_weights": [0.0, 0.0, 0.0]}),
        ("vocab_range must", {"vocab_range": (3, 3)}),
        ("vocab_range must", {"vocab_range": (-1, 3)}),
        ("vocab_range must", {"vocab_range": (0, 8)}),
        ("backend must", {"backend": "cuda"}),
        ("num_items must", {"num_items": -1}),
        ("num_items must", {"num_items": torch.zeros(2)}),
        ("num_items.rows must", {"num_items": NumItems([1, 2], 0)}),
        ("num_items.rows must", {"num_items": NumItems([1, 2, float("nan")], 0)}),
        ("num_items.het must", {"num_items": NumItems([1, 2, 3], -2)}),
        ("num_items.het must", {"num_items": NumItems([1, 2, 3], [1, 2])}),
        ("het.position must", {"het": HardTokens(SLOTS[:1], SLOTS)}),
        ("het.token must", {"het": HardTokens(SLOTS, SLOTS.float())}),
        ("het.token must", {"het": HardTokens(SLOTS, SLOTS[:, :2])}),
        ("token_weights must", {"token_weights": torch.zeros(2, 4)}),
        ("token_weights must", {"token_weights": LABELS}),
        ("options must", {"options": {"negatives": 3}}),
        ("negatives must be set in options", {"options": LossOptions(), "negatives": 3}),
        ("labels must be on the device of hidden \\(cpu\\), got meta", {"labels": LABELS.to("meta")}),
    ],
)
def test_refused(start: str, arguments: dict) -> None:
    call = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, "backend": "torch"} | arguments
    if "options" in call:
        del call["backend"]
    with pytest.raises(ValueError, match=f"^{start}"):
        ntp_loss(call.pop("hidden"), call.pop("weight"), call.pop("labels"), **call)


@pytest.mark.parametrize(
    ("start", "arguments"),
    [
        ("z_loss must", {"z_loss": -1.0}),
        ("gradient_filter must", {"gradient_filter": 1.0}),
        ("max_rows must", {"max_rows": 0}),
        ("chunk_bytes must", {"chunk_bytes": 0.5}),
        ("workspace must be one of auto, small, fast, got 'big'", {"workspace": "big"}),
        (r"options must be among negatives, .*, got 'epsilon'", {"epsilon": 1.0}),
        ("options must be given without further keywords, got negatives", {"options": LossOptions(), "negatives": 1}),
    ],
)
def test_module_refuses(start: str, arguments: dict) -> None:
    with pytest.raises(ValueError, match=f"^{start}"):
        NTPLoss(**arguments)


def test_too_many_rows_for_the_promised_bound() -> None:
    with pytest.raises(ValueError, match=r"^max_rows must be at least the supervised rows of every head, got 2:"):
        ntp_loss(HIDDEN, WEIGHT, LABELS, options=LossOptions(max_rows=2, backend="torch"))


def test_options_survive_their_text_form() -> None:
    options = LossOptions(3, 0.5, 1e-9, 2.0, (1.0, 0.25), 0, False, (3, 9), "torch", 1e-4, 2.0**-12, True, 7, 1 << 20)
    assert LossOptions.from_text(options.to_text()) == options
    others = LossOptions(negatives=0, logit_scale=-0.3, label_smoothing=0.1)
    assert LossOptions.from_text(others.to_text()) == others
    assert LossOptions.from_text(LossOptions(softcap=30.0).to_text()) == LossOptions(softcap=30.0)
    assert LossOptions.from_text(LossOptions(workspace="fast").to_text()) == LossOptions(workspace="fast")
    assert LossOptions.from_text(LossOptions().to_text()) == LossOptions()
