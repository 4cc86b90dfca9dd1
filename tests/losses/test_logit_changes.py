"""Bias, scale, softcap, label smoothing and the per-token loss, against logits and PyTorch's own cross-entropy."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from loss_cases import draw, error
from torch.nn import functional as F

from ntpseg import ntp_loss
from ntpseg.losses import LossOptions, token_nll


def run(case: Any, backend: str, dtype: torch.dtype, bias: torch.Tensor | None) -> tuple[Any, list[torch.Tensor]]:
    """The output, and the gradients of hidden, weight and bias."""
    leaves = [x.detach().to(dtype).clone().requires_grad_() for x in (case.hidden, case.weight)]
    if bias is not None:
        leaves.append(bias.to(dtype).clone().requires_grad_())
    options = case.options.with_backend(backend)
    tensors = case.tensors | ({} if bias is None else {"bias": leaves[2]})
    out = ntp_loss(leaves[0], leaves[1], case.labels, options=options, **tensors)
    return out, list(torch.autograd.grad(out.loss, leaves))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "keywords",
    [
        {"logit_scale": 0.25},
        {"softcap": 2.0},
        {"softcap": 4.0, "logit_scale": -1.5, "chunk_bytes": 1000},
        {"softcap": 3.0, "per_head": True, "vocab_range": (3, 15), "z_loss": 0.1},
        {"softcap": 3.0, "head_weights": (0.0, 1.0, 0.25), "temperature": 0.5},
        {"softcap": 500.0, "scale": 30.0, "classes": 700},
        {"label_smoothing": 0.1, "negatives": 0},
        {"label_smoothing": 0.3, "negatives": 0, "weighted": True, "per_head": True, "vocab_range": (2, 9)},
        {"label_smoothing": 0.3, "negatives": 0, "num_items": 7.0, "logit_scale": 2.0, "head_weights": (1.0, 0.5, 0.0)},
        {"label_smoothing": 0.3, "negatives": 0, "unsupervised": 1.0},
        {"vocab_range": (3, 15)},
    ],
    ids=str,
)
def test_equals_the_reference(keywords: dict, biased: bool, dtype: torch.dtype) -> None:
    case = draw(**keywords)
    bias = torch.randn(case.weight.shape[:-1], dtype=torch.float64) if biased else None
    truth, truth_grads = run(case, "reference", torch.float64, bias)
    result, found = run(case, "torch", dtype, bias)
    tolerance = 1e-11 if dtype == torch.float64 else 3e-5
    assert float(result.loss.detach()) == pytest.approx(float(truth.loss.detach()), rel=tolerance, abs=1e-12)
    assert torch.allclose(result.nll.double(), truth.nll, rtol=10 * tolerance, atol=10 * tolerance)
    assert all(error(one, other) < 3 * tolerance for one, other in zip(found, truth_grads))


def test_the_reference_is_pytorchs_own() -> None:
    """The definition itself, once, against code that nobody here wrote."""
    case = draw(k=1, slots=0, negatives=0, label_smoothing=0.2, logit_scale=0.7, unsupervised=0.2)
    bias = torch.randn(17, dtype=torch.float64)
    logits = (case.hidden[:, :-1, 0] @ case.weight.T + bias) * 0.7
    truth = F.cross_entropy(logits.flatten(0, 1), case.labels[:, 1:].flatten(), label_smoothing=0.2)
    assert float(run(case, "reference", torch.float64, bias)[0].loss.detach()) == pytest.approx(float(truth), rel=1e-12)
    capped = draw(k=1, slots=0, negatives=0, softcap=1.5, unsupervised=0.2)
    logits = 1.5 * torch.tanh((capped.hidden[:, :-1, 0] @ capped.weight.T) / 1.5)
    truth = F.cross_entropy(logits.flatten(0, 1), capped.labels[:, 1:].flatten())
    assert float(run(capped, "torch", torch.float64, None)[0].loss.detach()) == pytest.approx(float(truth), rel=1e-12)


def test_class_weights_are_token_weights() -> None:
    case = draw(k=1, slots=0, negatives=0, unsupervised=0.2)
    class_weights = torch.rand(17, dtype=torch.float64)
    logits = case.hidden[:, :-1, 0] @ case.weight.T
    truth = F.cross_entropy(logits.flatten(0, 1), case.labels[:, 1:].flatten(), weight=class_weights)
    case.tensors["token_weights"] = class_weights[case.labels.clamp_min(0)]
    assert float(case.loss(case.hidden, case.weight).loss) == pytest.approx(float(truth), rel=1e-12)


@pytest.mark.parametrize("keywords", [{}, {"softcap": 2.0, "logit_scale": 0.5}, {"shift": False}], ids=str)
def test_the_loss_of_every_token_has_a_gradient(keywords: dict) -> None:
    case = draw(k=1, slots=0, unsupervised=0.3, **keywords)
    bias = torch.randn(17, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (case.hidden, case.weight, bias)]
    nll = token_nll(leaves[0], leaves[1], case.labels, bias=leaves[2], options=case.options)
    step = int(case.options.shift)
    logits = (leaves[0][:, : 9 - step, 0] @ leaves[1].T + leaves[2]) * case.options.logit_scale
    if case.options.softcap:
        logits = case.options.softcap * torch.tanh(logits / case.options.softcap)
    truth = F.cross_entropy(logits.flatten(0, 1), case.labels[:, step:].flatten(), reduction="none")
    truth = F.pad(truth.view(2, -1), (step, 0))
    assert torch.allclose(nll, truth)
    incoming = torch.randn_like(nll)  # of either sign, as in a policy gradient
    expected = torch.autograd.grad(truth, leaves, incoming)
    assert all(error(one, other) < 1e-12 for one, other in zip(torch.autograd.grad(nll, leaves, incoming), expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "keywords",
    [{"softcap": 5.0}, {"logit_scale": 0.3}, {"label_smoothing": 0.1, "negatives": 0}, {"softcap": 5.0, "width": 64}],
    ids=str,
)
def test_low_precision(keywords: dict, dtype: torch.dtype) -> None:
    """Against float64 on the same rounded operands; without negatives, whose arg-max rounding may decide otherwise."""
    case = draw(**({"negatives": 0, "dtype": dtype, "classes": 300, "width": 32} | keywords))
    bias = torch.randn(300, dtype=torch.float64).to(dtype)
    truth, truth_grads = run(case, "reference", torch.float64, bias)
    result, found = run(case, "torch", dtype, bias)
    assert float(result.loss.detach()) == pytest.approx(float(truth.loss.detach()), rel=2e-2)
    assert all(error(one, other) < 3e-2 for one, other in zip(found, truth_grads))


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="CPU tensors need Triton's interpreter",
)
@pytest.mark.parametrize("keywords", [{"logit_scale": 0.3}, {"label_smoothing": 0.1, "negatives": 0}], ids=str)
def test_kernels_have_them_too(keywords: dict) -> None:
    case = draw(**({"dtype": torch.float32, "width": 16} | keywords))
    bias = torch.randn(17, dtype=torch.float64)
    truth, truth_grads = run(case, "reference", torch.float64, bias)
    result, found = run(case, "triton", torch.float32, bias)
    assert float(result.loss.detach()) == pytest.approx(float(truth.loss.detach()), rel=1e-4)
    assert all(error(one, other) < 1e-4 for one, other in zip(found, truth_grads))


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_a_gradient_of_one_operand_alone(wanted: tuple[bool, bool, bool]) -> None:
    case = draw(softcap=2.0)
    bias = torch.randn(17, dtype=torch.float64)
    grads = []
    for backend in ("reference", "torch"):
        leaves = [x.clone().requires_grad_(need) for x, need in zip((case.hidden, case.weight, bias), wanted)]
        options = case.options.with_backend(backend)
        out = ntp_loss(leaves[0], leaves[1], case.labels, bias=leaves[2], options=options, **case.tensors)
        (2.5 * out.loss).backward()
        grads.append([leaf.grad for leaf in leaves])
    for one, other, need in zip(*grads, wanted):
        assert (one is not None) == (other is not None) == need
        assert one is None or error(other, one) < 1e-11


def test_operands_that_are_not_contiguous() -> None:
    case = draw(softcap=2.0, logit_scale=0.5)
    bias = torch.randn(17, dtype=torch.float64)
    truth, truth_grads = run(case, "reference", torch.float64, bias)
    hidden = case.hidden.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    weight = case.weight.t().contiguous().t().requires_grad_()
    strided = torch.stack([bias, bias], 1)[:, 0].requires_grad_()
    out = ntp_loss(hidden, weight, case.labels, bias=strided, options=case.options, **case.tensors)
    assert float(out.loss.detach()) == pytest.approx(float(truth.loss.detach()), rel=1e-12)
    found = torch.autograd.grad(out.loss, [hidden, weight, strided])
    assert all(error(one, other) < 1e-11 for one, other in zip(found, truth_grads))


@pytest.mark.parametrize(
    "keywords", [{"softcap": 2.0}, {"logit_scale": 2.0}, {"label_smoothing": 0.2, "negatives": 0}], ids=str
)
def test_nothing_supervised_is_a_zero_with_zero_gradients(keywords: dict) -> None:
    for more in ({"unsupervised": 1.0}, {"time": 1, "k": 1}):
        out, grads = run(draw(**(keywords | more)), "torch", torch.float32, torch.randn(17))
        assert float(out.loss.detach()) == 0
        assert not any(grad.any() for grad in grads)


def test_filtered_gradients_with_a_softcap() -> None:
    case = draw(softcap=8.0, scale=4.0, classes=600, gradient_filter=1e-9)
    _, truth = run(case, "reference", torch.float64, None)
    _, found = run(case, "torch", torch.float64, None)
    assert all(error(one, other) < 1e-5 for one, other in zip(found, truth))


def test_autocast_reaches_the_bias() -> None:
    case = draw(dtype=torch.float32, width=32, negatives=0)
    leaves = [x.requires_grad_() for x in (case.hidden, case.weight, torch.randn(17))]
    truth = ntp_loss(*leaves[:2], case.labels, bias=leaves[2], options=case.options, **case.tensors)
    with torch.autocast("cpu", torch.bfloat16):
        out = ntp_loss(*leaves[:2], case.labels, bias=leaves[2], options=case.options, **case.tensors)
    assert float(out.loss.detach()) == pytest.approx(float(truth.loss.detach()), rel=2e-2)
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(out.loss, leaves))


def test_refused() -> None:
    case = draw(k=1)
    with pytest.raises(ValueError, match=r"bias must be a float \[17\]"):
        ntp_loss(case.hidden, case.weight, case.labels, bias=torch.zeros(16))
    with pytest.raises(ValueError, match="negatives must be 0 with label_smoothing"):
        LossOptions(label_smoothing=0.1)
    with pytest.raises(ValueError, match="softcap must be None with label_smoothing"):
        LossOptions(label_smoothing=0.1, negatives=0, softcap=3.0)
    with pytest.raises(ValueError, match="backend must be auto, torch or reference with softcap"):
        ntp_loss(case.hidden, case.weight, case.labels, options=LossOptions(softcap=3.0, backend="triton"))
    with pytest.raises(ValueError, match="logit_scale must not be 0"):
        LossOptions(logit_scale=0.0)
    with pytest.raises(ValueError, match="hidden must have one head"):
        token_nll(draw(k=2).hidden, case.weight, case.labels)
    with pytest.raises(ValueError, match=r"got those of a torch\.func transform"):
        torch.func.grad(lambda h: ntp_loss(h, case.weight, case.labels).loss)(case.hidden)
