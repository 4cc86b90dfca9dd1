"""Compaction by kernels on a GPU: the same rows as in plain PyTorch, and no more synchronisation than it promises."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ntpseg.kernels.fused_forward import FusedForward
from ntpseg.losses import LossOptions
from ntpseg.losses.compaction import Compaction, compact
from ntpseg.losses.compaction_triton import TritonCompaction, compact_triton
from ntpseg.losses.host_copy import HostCopy
from ntpseg.losses.supervision import Supervision

pytestmark = pytest.mark.gpu

SHAPE = (7, 500, 3)


def _arguments() -> tuple[torch.Tensor, Supervision, int]:
    make = torch.Generator("cuda").manual_seed(0)
    keys = {"device": "cuda", "generator": make}
    batch, time, _ = SHAPE
    labels = torch.randint(0, 900, (batch, time), **keys)
    labels[torch.rand(batch, time, **keys) < 0.4] = -100
    hidden = torch.randn(*SHAPE, 72, **keys).bfloat16()
    supervision = Supervision(
        labels=labels,
        het_position=torch.randint(-1, time, (batch, 90), **keys),
        het_token=torch.randint(0, 900, (batch, 90), **keys),
        token_weights=torch.rand(batch, time, **keys),
    )
    return hidden, supervision, 900


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("options", [LossOptions(), LossOptions(max_rows=2500, head_weights=(1.0, 0.5, 0.0))], ids=str)
def test_equals_plain(options: LossOptions, per_head: bool) -> None:
    arguments = _arguments()
    plain = compact(*arguments, options, per_head_weight=per_head)
    result = compact_triton(*arguments, options, per_head_weight=per_head)
    rows = plain.rows
    assert rows.segments == result.rows.segments
    real = rows.index >= 0
    for name in ("target", "num_negatives", "hard_tokens", "index"):
        assert torch.equal(getattr(rows, name), getattr(result.rows, name)), name
    assert torch.equal(rows.hidden[real], result.rows.hidden[real])
    torch.testing.assert_close(rows.row_weight, result.rows.row_weight, rtol=1e-6, atol=0)
    torch.testing.assert_close(rows.entry_weight, result.rows.entry_weight, rtol=1e-6, atol=0)
    _assert_returns(plain, result, real)


def _assert_returns(plain: Compaction, result: TritonCompaction, real: torch.Tensor) -> None:
    prediction = torch.where(real, torch.arange(len(real), device="cuda"), -1)
    nll, margin = torch.rand(2, len(real), device="cuda").masked_fill(~real, 0.0)
    scattered = (each.scatter_results(prediction, nll, margin, 5) for each in (plain, result))
    for a, b in zip(*scattered, strict=True):
        assert torch.equal(a, b)
    gradient = torch.randn(len(real), 72, device="cuda").bfloat16() * real.unsqueeze(1)
    assert torch.equal(plain.scatter_gradient(gradient), result.scatter_gradient(gradient))


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("options", [LossOptions(), LossOptions(max_rows=2500, head_weights=(1.0, 0.5, 0.0))], ids=str)
def test_never_synchronises_a_stream(options: LossOptions, per_head: bool) -> None:
    arguments = _arguments()
    compact_triton(*arguments, options, per_head_weight=per_head)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            compact_triton(*arguments, options, per_head_weight=per_head)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    result = [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
    assert not result, result  # the one wait is for an event


@pytest.mark.parametrize("label", [900, -1, 1 << 40])
def test_a_wrong_label_is_named_and_the_device_goes_on(label: int) -> None:
    hidden, supervision, classes = _arguments()
    labels = supervision.labels.clone()
    labels[3, 200] = label
    with pytest.raises(ValueError, match=rf"labels must be .* got {label}$"):
        compact_triton(hidden, supervision._replace(labels=labels), classes, LossOptions(), per_head_weight=False)
    torch.cuda.synchronize()
    compact_triton(hidden, supervision, classes, LossOptions(), per_head_weight=False)


def test_counts_of_calls_in_flight_stay_apart() -> None:
    sources = [torch.full((7,), i, device="cuda") for i in range(20)]
    copies = [HostCopy.start(source) for source in sources]
    assert [copy.wait() for copy in copies] == [[i] * 7 for i in range(20)]


def test_a_wrong_label_is_caught_on_the_device_where_nothing_is_counted() -> None:
    code = """
import torch
from ntpseg import ntp_loss
from ntpseg.losses import LossOptions
hidden, weight = torch.randn(2, 9, 1, 64, device="cuda"), torch.randn(50, 64, device="cuda")
labels = torch.full((2, 9), 50, device="cuda")
ntp_loss(hidden, weight, labels, options=LossOptions(max_rows=18, backend="triton"))
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "ssert" in done.stderr, done.stderr[-2000:]


def test_the_product_is_launched_before_the_host_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, supervision, classes = _arguments()
    weight = torch.randn(classes, 72, device="cuda").bfloat16()
    launched = []
    launch, wait = FusedForward.launch, HostCopy.wait

    def seen(self: FusedForward, *args: Tensor, **kwargs: Tensor) -> None:
        launch(self, *args, **kwargs)
        launched.append("product")

    def waited(self: HostCopy) -> list[int]:
        launched.append("wait")
        return wait(self)

    monkeypatch.setattr(FusedForward, "launch", seen)
    monkeypatch.setattr(HostCopy, "wait", waited)
    arguments = hidden, supervision, classes, LossOptions()
    compact_triton(*arguments, per_head_weight=False, weight=weight)
    assert launched == ["product", "wait"]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # the one wait is for an event that stands before the product
    try:
        compact_triton(*arguments, per_head_weight=False, weight=weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
