"""The loss as one custom operator: opcheck, torch.compile without a break."""

from __future__ import annotations

import contextlib

import pytest
import torch
from loss_cases import draw, error

from ntpseg import HardTokens, NumItems, ntp_loss
from ntpseg.losses import LossOptions
from ntpseg.losses.fused import loss_op


def arguments(
    per_head: bool = False, hidden_grad: bool = True, weight_grad: bool = True, dtype: torch.dtype = torch.float32
) -> tuple:
    case = draw(2, 7, 2, 8, 19, per_head=per_head, dtype=dtype, backend="torch")
    hidden = case.hidden.requires_grad_(hidden_grad)
    weight = case.weight.requires_grad_(weight_grad)
    het = case.tensors["het"]
    rows, number = torch.tensor([9.0, 7.0]), torch.tensor(3.0)
    tensors = hidden, weight, case.labels, het.position, het.token, None, rows, number, False
    return *tensors, case.options.to_text(), hidden_grad, weight_grad, "", 0, 19


@pytest.mark.parametrize(
    "keywords",
    [{}, {"per_head": True}, {"weight_grad": False}, {"hidden_grad": False}, {"dtype": torch.float16}],
    ids=str,
)
def test_opcheck(keywords: dict) -> None:
    torch.library.opcheck(loss_op, arguments(**keywords))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_without_a_break(dtype: torch.dtype) -> None:
    case = draw(2, 9, 3, 8, 19, dtype=dtype)
    het = case.tensors["het"]

    def step(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = ntp_loss(
            torch.tanh(hidden),
            weight,
            case.labels,
            het=HardTokens(het.position, het.token),
            num_items=NumItems([5, 6, 7], 3),
            head_weights=[1.0, 0.5, 0.25],
            vocab_range=(0, 19),
        )
        return out.loss, out.prediction, out.nll

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        loss, prediction, nll = function(hidden, weight)
        loss.backward()
        results.append((loss.detach(), prediction, nll, hidden.grad, weight.grad))
    for eager, compiled in zip(*results):
        assert torch.allclose(eager, compiled, rtol=1e-5, atol=1e-6)


def test_compiles_once_for_changing_lengths() -> None:
    weight = torch.randn(19, 8)
    options = LossOptions(negatives=3)
    compiled = torch.compile(
        lambda h, y: ntp_loss(h, weight, y, options=options).loss, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for time in (5, 6, 11):
        case = draw(2, time, 2, 8, 19, dtype=torch.float32, slots=0)
        plain = ntp_loss(case.hidden, weight, case.labels, options=options).loss
        assert error(compiled(case.hidden, case.labels), plain) < 1e-6


@pytest.mark.parametrize("offload", [False, True])
def test_backward_again_over_a_kept_graph(offload: bool) -> None:
    """A [B, T, D] leaf gets a view of what the operator returns: the saved gradient must not be that."""
    case = draw(dtype=torch.float32, k=1)
    hidden, weight = case.hidden[:, :, 0].clone().requires_grad_(), case.weight.clone().requires_grad_()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x) if offload else contextlib.nullcontext()
    with hooks:
        loss = case.loss(hidden, weight).loss
    loss.backward(retain_graph=True)
    once = hidden.grad.clone(), weight.grad.clone()
    torch.nn.utils.clip_grad_norm_([hidden, weight], 1e9)
    for times in (2, 3, 4):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(hidden.grad, times * once[0])
        torch.testing.assert_close(weight.grad, times * once[1])


def test_batched_incoming_gradients() -> None:
    case = draw(dtype=torch.float32)
    weight = case.weight.clone().requires_grad_()
    loss = case.loss(case.hidden, weight).loss
    factors = torch.tensor([1.0, -0.5])
    (batched,) = torch.autograd.grad(loss, weight, factors, retain_graph=True, is_grads_batched=True)
    (one,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(batched, factors.view(2, 1, 1) * one)
