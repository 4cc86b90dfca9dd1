"""Every wrong argument of the loss is a ValueError that names it, in the same words from every backend."""

from __future__ import annotations

import importlib.util
import resource
from typing import Any

import pytest
import torch
from wrong_arguments import HIDDEN, LABELS, REFUSED, REFUSED_OPTIONS, WEIGHT, WEIGHTS, put

from ntpseg import NTPLoss, ntp_loss
from ntpseg.losses import LossOptions, count_items, token_nll
from ntpseg.losses.compaction import compact
from ntpseg.losses.supervision import Supervision

BACKENDS = ["reference", "torch", "native"]
if importlib.util.find_spec("triton"):
    BACKENDS.append("triton")


def message(arguments: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `ntp_loss` says to these arguments, and nothing but a ValueError may say it."""
    monkeypatch.setenv("NTPSEG_DISABLE_NATIVE", "0" if backend == "native" else "1")
    call = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS} | arguments
    name = "torch" if backend == "native" else backend
    options = {"options": LossOptions(backend=name, **call.pop("options"))} if "options" in call else {"backend": name}
    with pytest.raises(ValueError) as refused:
        ntp_loss(call.pop("hidden"), call.pop("weight"), call.pop("labels"), **options, **call)
    return str(refused.value)


@pytest.mark.parametrize(("arguments", "start"), REFUSED, ids=[start[:60] for _, start in REFUSED])
def test_every_backend_refuses_alike(arguments: dict, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {backend: message(arguments, backend, monkeypatch) for backend in BACKENDS}
    assert len(set(said.values())) == 1, said
    (text,) = set(said.values())
    assert text.startswith(start) and "\n" not in text and len(text) < 250


@pytest.mark.parametrize(("options", "start"), REFUSED_OPTIONS, ids=str)
def test_options_are_refused(options: dict, start: str) -> None:
    for refuses in (LossOptions, NTPLoss):
        with pytest.raises(ValueError) as refused:
            refuses(**options)
        assert str(refused.value).startswith(start)


def test_more_rows_than_were_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"options": {"max_rows": 1}}
    said = {message(options, backend, monkeypatch) for backend in BACKENDS if backend != "reference"}
    assert said == {"max_rows must be at least the supervised rows of every head, got 1: room for 3 of 15 rows"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_that_nobody_reads_may_be_anything(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A label that is never predicted, a weight without a label, hard tokens that point nowhere."""
    monkeypatch.setenv("NTPSEG_DISABLE_NATIVE", "0" if backend == "native" else "1")
    name = "torch" if backend == "native" else backend
    plain = ntp_loss(HIDDEN, WEIGHT, LABELS, backend=name)
    weights = put(put(WEIGHTS, torch.nan, 0, 3), -5.0, 1, 0)
    for max_rows in (None, 10):
        options = LossOptions(backend=name, max_rows=max_rows)
        out = ntp_loss(HIDDEN, WEIGHT, put(LABELS, 99, 1, 0), token_weights=weights, options=options)
        torch.testing.assert_close(out.loss, plain.loss)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("asked", [5, 10**9, 2**63 - 1])
def test_more_negatives_than_positions_cost_nothing(backend: str, asked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NTPSEG_DISABLE_NATIVE", "0" if backend == "native" else "1")
    name = "torch" if backend == "native" else backend
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    out = ntp_loss(hidden, weight, LABELS, negatives=asked, backend=name)
    out.loss.backward()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    truth = ntp_loss(HIDDEN.double(), WEIGHT.double(), LABELS, negatives=4, backend="reference")
    torch.testing.assert_close(out.tcl.double(), truth.tcl, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_on_a_device_are_refused_with_the_rows(dtype: torch.dtype) -> None:
    """Where looking would have to wait, the check of counts is part of finding the rows; kernels do it the same."""
    rows, het = torch.tensor([3.0, torch.nan, 2.0]), torch.tensor(-1.0)
    for counts in ({"num_rows": rows}, {"num_rows": rows.nan_to_num(2.0), "num_het": het}):
        supervision, options = Supervision(LABELS, **counts), LossOptions()
        pytest.importorskip("triton")
        from ntpseg.losses.compaction_triton import compact_triton

        with pytest.raises(ValueError, match=r"^num_items must be finite and >= 0, got (\[3.0, nan, 2.0\]|-1.0)$"):
            compact_triton(HIDDEN, supervision, 7, options, per_head_weight=False)
    assert compact(HIDDEN.to(dtype), Supervision(LABELS), 7, LossOptions(), per_head_weight=False).rows.target.numel()


def test_an_incoming_gradient_is_no_weight() -> None:
    """`token_nll` weighs by what comes in from above, which may be negative or, under a loss scale, infinite."""
    hidden = HIDDEN[:, :, 0].clone().requires_grad_()
    for factor in (-1.0, torch.inf):
        token_nll(hidden, WEIGHT, LABELS, options=LossOptions(negatives=0)).sum().mul(factor).backward()
    with pytest.raises(ValueError, match=r"^options must be a LossOptions, got a dict"):
        token_nll(hidden, WEIGHT, LABELS, options={"negatives": 0})
    with pytest.raises(ValueError, match=r"^labels must be ignore_index or in \[0, 7\), got 7"):
        token_nll(hidden, WEIGHT, put(LABELS, 7))


def test_the_meta_device_has_shapes_alone() -> None:
    for backend in ("torch", "reference"):
        out = ntp_loss(HIDDEN.to("meta"), WEIGHT.to("meta"), LABELS.to("meta"), backend=backend)
        assert out.loss.shape == () and out.prediction.shape == (2, 5) and out.loss.device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        ({"labels": LABELS[:, :0]}, "labels must have T >= 1 positions, got int64 [2, 0]"),
        ({"labels": [[1]]}, "labels must be an int64 [B, T] tensor, got a list"),
        ({"labels": put(LABELS, -1)}, "labels must be ignore_index or >= 0, got -1"),
        ({"vocab_range": (0, 6)}, "labels must be ignore_index or in [0, 6), got 6"),
        ({"vocab_range": (None, 6)}, "vocab_range must be two integers"),
        ({"token_weights": put(WEIGHTS, torch.nan)}, "token_weights must be finite and >= 0 where there is a label"),
        ({"token_weights": put(WEIGHTS, -1)}, "token_weights must be finite and >= 0 where there is a label, got -1"),
        ({"ignore_index": 0.5}, "ignore_index must be an integer"),
        ({"shift": 2}, "shift must be True or False, got 2"),
        ({"het": [1, 2]}, "het must be a HardTokens, got a list"),
        ({"k": 2.0}, "k must be an integer >= 1, got 2.0"),
        ({"k": True}, "k must be an integer >= 1, got True"),
    ],
)
def test_count_items_refuses(arguments: dict, start: str) -> None:
    call = {"labels": LABELS, "k": 3} | arguments
    with pytest.raises(ValueError) as refused:
        count_items(call.pop("labels"), call.pop("k"), **call)
    assert str(refused.value).startswith(start)


def test_heads_beyond_the_sequence_count_nothing() -> None:
    assert count_items(LABELS, 7).rows.tolist() == [7.0, 5.0, 3.0, 2.0, 0.0, 0.0, 0.0]
    assert count_items(LABELS[:, :1], 2).rows.tolist() == [0.0, 0.0]
