"""``ntp_loss(backend="triton")``: the whole contract over the kernels, against the reference."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[1] / "losses"))

from loss_cases import PARTS, Case, draw

from ntpseg import HardTokens, NumItems, ntp_loss
from ntpseg.kernels.tl_utils import INTERPRETED
from ntpseg.losses import LossOptions

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="CPU tensors need Triton's interpreter")

F32 = torch.float32


def _assert_equals_reference(case: Case, tolerance: float = 3e-6) -> None:
    expected, d_hidden, d_weight = case.run("reference", torch.float64)
    result, got_hidden, got_weight = case.run("triton", F32)
    for part in PARTS:
        torch.testing.assert_close(
            getattr(result, part).double(), getattr(expected, part), rtol=tolerance, atol=tolerance, msg=part
        )
    assert torch.equal(result.prediction, expected.prediction)
    torch.testing.assert_close(result.nll.double(), expected.nll, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(result.margin.double(), expected.margin, rtol=tolerance, atol=tolerance)
    for got, truth in ((got_hidden, d_hidden), (got_weight, d_weight)):
        assert float((got.double() - truth).norm()) <= tolerance * float(truth.norm()) + 1e-9


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"per_head": True},
        {"k": 1, "negatives": 0, "slots": 0},
        {"k": 8, "time": 12, "negatives": 32},
        {"head_weights": (0.0, 1.0, 0.5)},
        {"vocab_range": (5, 14)},
        {"vocab_range": (5, 14), "per_head": True, "temperature": 0.5},
        {"shift": False},
        {"num_items": NumItems(rows=[40.0, 30.0, 20.0], het=7.0)},
        {"weighted": True, "tcl_weight": 0.0},
        {"max_rows": 18},
        {"max_rows": 18, "per_head": True},
        {"z_loss": 0.1, "het_weight": 3.0},
        {"chunk_bytes": 64 * 4 * 7},
        {"unsupervised": 1.0},
        {"scale": 20.0},
    ],
    ids=str,
)
def test_contract(keywords: dict) -> None:
    _assert_equals_reference(draw(dtype=F32, **keywords), 1e-5 if "scale" in keywords else 3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_error_is_within_twice_that_of_pytorch(dtype: torch.dtype, scale: float) -> None:
    case = draw(time=40, width=32, classes=200, dtype=dtype, scale=scale)
    expected, *truth = case.run("reference", torch.float64)
    plain, *eager = case.run("reference")
    result, *got = case.run("triton")
    assert abs(result.loss - expected.loss) <= 2 * abs(plain.loss - expected.loss) + 1e-6 * expected.loss
    for ours, theirs, exact in zip(got, eager, truth, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - exact).norm() <= 2 * (theirs.double() - exact).norm()


def test_autocast_and_views() -> None:
    case = draw(dtype=F32, k=2, width=16)
    wide = torch.randn(2, 9, 2, 32)
    wide[..., :16] = case.hidden
    hidden = wide[..., :16].requires_grad_()
    assert not hidden.is_contiguous()
    weight = case.weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = case.loss(hidden, weight, "triton")
    out.loss.backward()
    assert weight.grad.dtype == F32
    exact, _, d_weight = case.run("reference", torch.float64)
    assert abs(out.loss - exact.loss) < 2e-2 * exact.loss
    assert (weight.grad.double() - d_weight).norm() < 3e-2 * d_weight.norm()


def test_any_strides() -> None:
    case = draw(dtype=F32, k=2, width=16)
    expected, d_hidden, d_weight = case.run("reference")
    far = torch.randn(16, 2, 9, 2).permute(1, 2, 3, 0)  # features far apart
    later = torch.randn(2, 20, 2, 16)[:, 11:]  # samples apart
    wide = torch.randn(17, 32)[:, ::2]
    turned = torch.randn(16, 17).t()
    for place in (far, later):
        for room in (wide, turned):
            hidden = place.copy_(case.hidden).detach().requires_grad_()
            weight = room.copy_(case.weight).detach().requires_grad_()
            assert not hidden.is_contiguous() and not weight.is_contiguous()
            out = case.loss(hidden, weight, "triton")
            got = torch.autograd.grad(out.loss, (hidden, weight))
            torch.testing.assert_close(out.loss, expected.loss, rtol=3e-6, atol=0)
            torch.testing.assert_close(got[0], d_hidden, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(got[1], d_weight, rtol=1e-4, atol=1e-6)


def test_an_empty_batch_gives_zero() -> None:
    weight = torch.randn(17, 8, requires_grad=True)
    for shape in ((0, 5), (0, 1)):
        hidden = torch.randn(*shape, 2, 8, requires_grad=True)
        for keywords in ({}, {"max_rows": 3}):
            options = LossOptions(backend="triton", **keywords)
            out = ntp_loss(hidden, weight, torch.zeros(shape, dtype=torch.int64), options=options)
            out.loss.backward()
            assert out.loss == 0 and out.prediction.shape == shape and not weight.grad.any()


def test_second_backward_and_frozen_operands() -> None:
    case = draw(dtype=F32)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    loss = case.loss(hidden, weight, "triton").loss
    loss.backward(retain_graph=True)
    once = hidden.grad.clone(), weight.grad.clone()
    (3 * loss).backward()
    torch.testing.assert_close(hidden.grad, 4 * once[0])
    torch.testing.assert_close(weight.grad, 4 * once[1])
    alone = case.hidden.clone().requires_grad_()
    case.loss(alone, case.weight, "triton").loss.backward()
    assert torch.equal(alone.grad, once[0])


def test_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    from ntpseg.losses import triton_backend

    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    case = draw(dtype=F32)
    with pytest.raises(ValueError, match="hidden must be on a CUDA device"):
        ntp_loss(case.hidden, case.weight, case.labels, backend="triton")


def test_compiles_without_a_break() -> None:
    case = draw(dtype=F32, time=5, k=2)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    step = torch.compile(lambda h, w: case.loss(h, w, "triton").loss, fullgraph=True, backend="aot_eager")
    step(hidden, weight).backward()
    got = hidden.grad.clone()
    hidden.grad = None
    case.loss(hidden, weight, "triton").loss.backward()
    torch.testing.assert_close(got, hidden.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "keywords",
    [
        {"width": 8},
        {"width": 11},  # rows that are not aligned
        {"width": 8, "per_head": True, "chunk_bytes": 64 * 2 * 7},
        {"width": 11, "per_head": True, "max_rows": 18},
        {"width": 8, "max_rows": 18, "chunk_bytes": 64 * 4 * 7},
        {"width": 16, "gradient_filter": 1e-9},
        {"width": 16, "unsupervised": 0.0, "shift": False, "k": 1},  # no place without a row
        {"width": 8, "unsupervised": 1.0},
    ],
    ids=str,
)
def test_gradient_of_hidden_lands_in_its_place(
    keywords: dict, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = draw(dtype=dtype, **keywords)
    fresh = torch.empty

    def dirty(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = fresh(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", dirty)
    # the way that ranks and other backends go: rows first, their places afterwards
    plain = case.run("torch", torch.float64)[1]
    got = case.run("triton")[1]
    assert got.shape == case.hidden.shape and got.dtype == dtype
    assert not got[plain == 0].any()
    error = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    assert float((got.double() - plain).norm()) <= error * float(plain.norm()) + 1e-9


@pytest.mark.parametrize("case", ["sum", "one row", "mean", "tiny", "hard tokens alone"])
def test_float16_takes_row_weights_of_any_size(case: str) -> None:
    """Rows times their weight are a product's operand: the largest must neither overflow nor vanish there."""
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(1, 513, 16), torch.randn(32, 16) * 0.5, torch.randint(0, 32, (1, 513))
    hidden[..., 0], weight[:, 0] = 200.0, 0.0
    hidden[0, :-1, 1:] = weight[labels[0, 1:], 1:] * 4
    hidden[0, 4, 1:] = 0.0  # a row that is not sure has a gradient of its own
    hidden, weight = hidden.half(), weight.half()
    keywords: dict[str, Any] = {"negatives": 0}
    if case in ("sum", "tiny"):
        keywords["num_items"] = 1.0 if case == "sum" else 1e9
    if case == "one row":
        keywords["token_weights"] = torch.zeros(1, 513)
        keywords["token_weights"][0, 5] = 1.0
    if case == "hard tokens alone":
        keywords["token_weights"] = torch.ones(1, 513)
        keywords["token_weights"][0, 3] = 0.0
        token = (labels[0, 3] + 1) % 32
        keywords |= {"het": HardTokens(torch.tensor([[3]]), token.reshape(1, 1)), "het_weight": 1.0}
    found = []
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float16)):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        factor = 1e6 if case == "tiny" else 1.0  # a loss scale, so that float16 holds the result
        (ntp_loss(*leaves, labels, backend=backend, **keywords).loss * factor).backward()
        found.append([leaf.grad.double() for leaf in leaves])
    for truth, got in zip(*found):
        assert got.isfinite().all()
        assert float((got - truth).norm()) <= 4e-3 * float(truth.norm())
