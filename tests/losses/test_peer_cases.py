"""Cases that other fused cross-entropies are tested for and no other file here has, against logits in float64.

docs/loss-coverage.md says which case of which suite is where.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_cases import error
from torch import Tensor, nn
from torch.nn import functional as F

from ntpseg import NTPOutput, ntp_loss
from ntpseg.losses import LossOptions, count_items, token_nll
from ntpseg.losses.fused_cross_entropy import fused_cross_entropy
from ntpseg.ops import extension

CLASSES, WIDTH = 41, 24
PLAIN = {"negatives": 0, "shift": False}


@pytest.fixture(params=["native", "torch", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The torch backend with and without the native operators, and the reference."""
    usable = extension.usable("cpu")  # remembered, so asked before it is switched off
    if request.param == "native":
        if not usable:
            pytest.skip("needs the native extension")
        return "torch"
    monkeypatch.setenv("NTPSEG_DISABLE_NATIVE", "1")
    return request.param


def operands(batch: int = 3, time: int = 7, classes: int = CLASSES, width: int = WIDTH) -> tuple[Tensor, ...]:
    """hidden, weight, labels, bias in float64; a third of the labels is -100."""
    make = torch.Generator().manual_seed(batch * 100 + time)
    hidden = torch.randn(batch, time, width, generator=make, dtype=torch.float64)
    weight = torch.randn(classes, width, generator=make, dtype=torch.float64) / width**0.5
    labels = torch.randint(0, classes, (batch, time), generator=make)
    labels[torch.rand(batch, time, generator=make) < 0.33] = -100
    return hidden, weight, labels, torch.randn(classes, generator=make, dtype=torch.float64)


def leaves(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(dtype).detach().clone().requires_grad_() for tensor in tensors]


def fused(hidden: Tensor, weight: Tensor, labels: Tensor, backend: str, bias: Any = None, **more: Any) -> NTPOutput:
    tensors = {name: more.pop(name) for name in ("token_weights", "num_items") if name in more}
    return ntp_loss(
        hidden, weight, labels, bias=bias, options=LossOptions(backend=backend, **{**PLAIN, **more}), **tensors
    )


def exact(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, **more: Any) -> Tensor:
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten().long(), **more)


@pytest.mark.parametrize("ignore_index", [-100, -300, 2, CLASSES - 1])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_every_option_at_once(backend: str, ignore_index: int, reduction: str, label_smoothing: float) -> None:
    """An ignored label that is a class of the vocabulary, with bias, smoothing, z-loss, and an upstream factor."""
    hidden, weight, labels, bias = operands()
    labels = torch.where(labels == -100, ignore_index, labels)
    ours, theirs = leaves(torch.float64, hidden, weight, bias), leaves(torch.float64, hidden, weight, bias)
    seen = (labels != ignore_index).flatten()
    out = fused(
        *ours[:2],
        labels,
        backend,
        ours[2],
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=0.01,
        num_items=1.0 if reduction == "sum" else None,
    )
    squares = (theirs[0] @ theirs[1].T + theirs[2]).flatten(0, 1)[seen].logsumexp(-1).square()
    z = squares.sum() if reduction == "sum" else squares.mean()
    ce = exact(
        *theirs[:2],
        labels,
        theirs[2],
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    assert float(out.z) == pytest.approx(float(z.detach()), rel=1e-12)
    assert float(out.loss.detach()) == pytest.approx(float((ce + 0.01 * z).detach()), rel=1e-12)
    (-3.5 * out.loss).backward()
    (-3.5 * (ce + 0.01 * z)).backward()
    assert all(error(one.grad, other.grad) < 1e-12 for one, other in zip(ours, theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_error_is_that_of_pytorch_in_the_same_dtype(backend: str, dtype: torch.dtype, biased: bool) -> None:
    hidden, weight, labels, bias = (
        tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in operands(5, 19, 123, 31)
    )
    inputs = [hidden, weight, *([bias] if biased else [])]
    found = {}
    for name, kind in (("truth", torch.float64), ("eager", dtype), ("ours", dtype)):
        parts = leaves(kind, *inputs)
        bias_of = parts[2] if biased else None
        if name == "ours":
            loss = fused(*parts[:2], labels, backend, bias_of).loss
        else:
            loss = exact(*parts[:2], labels, bias_of)
        found[name] = [loss.detach(), *torch.autograd.grad(loss, parts)]
    for ours, eager, truth in zip(found["ours"], found["eager"], found["truth"]):
        # one rounding of the result is granted where PyTorch happens to be exact
        assert error(ours, truth) <= 2 * error(eager, truth) + 2 * torch.finfo(dtype).eps


def test_int32_labels_and_views_that_are_shifted(backend: str) -> None:
    hidden, weight, labels, _ = operands()
    truth = leaves(torch.float64, hidden, weight)
    exact(truth[0][:, :-1], truth[1], labels[:, 1:]).backward()
    wide = torch.full((3, 14), 10**6, dtype=torch.int32)
    wide[:, ::2] = labels.int()
    for arguments in ({"shift": True}, {}):
        ours = leaves(torch.float64, hidden, weight)
        view = slice(None) if arguments else slice(1, None)
        states = ours[0] if arguments else ours[0][:, :-1]
        fused(states, ours[1], wide[:, ::2][:, view], backend, **arguments).loss.backward()
        assert all(error(one.grad, other.grad) < 1e-12 for one, other in zip(ours, truth))
    assert torch.equal(count_items(labels.int(), 2).rows, count_items(labels, 2).rows)


def test_expanded_hidden_and_weight_of_a_larger_table(backend: str) -> None:
    """A stride of zero, and rows that lie apart in memory."""
    hidden, weight, labels, _ = operands()
    row, table = leaves(torch.float64, hidden[:1], torch.cat([weight, weight], 1))
    fused(row.expand(3, -1, -1), table[:, :WIDTH], labels, backend).loss.backward()
    row_truth, table_truth = leaves(torch.float64, row, table)
    exact(row_truth.expand(3, -1, -1), table_truth[:, :WIDTH], labels).backward()
    assert error(row.grad, row_truth.grad) < 1e-12 and error(table.grad, table_truth.grad) < 1e-12


@pytest.mark.parametrize("shape", [(0, 7), (0, 1), (1, 1)])
def test_empty_batches_and_single_rows(backend: str, shape: tuple[int, int]) -> None:
    hidden, weight, labels, bias = operands(*shape)
    labels = labels.clamp_min(0)
    ours = leaves(torch.float32, hidden, weight, bias)
    out = fused(*ours[:2], labels, backend, ours[2])
    out.loss.backward()
    assert out.nll.shape == shape and ours[0].grad.shape == hidden.shape
    if labels.numel():
        truth = leaves(torch.float64, hidden, weight, bias)
        loss = exact(*truth[:2], labels, truth[2])
        loss.backward()
        assert float(out.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
        assert all(error(one.grad, other.grad) < 1e-5 for one, other in zip(ours, truth))
    else:
        assert float(out.loss.detach()) == 0 and not any(leaf.grad.any() for leaf in ours)


@pytest.mark.parametrize("label", [0, CLASSES - 1])
def test_first_and_last_class(backend: str, label: int) -> None:
    hidden, weight, labels, _ = operands()
    labels = torch.full_like(labels, label)
    ours, truth = leaves(torch.float32, hidden, weight), leaves(torch.float64, hidden, weight)
    fused(*ours, labels, backend).loss.backward()
    exact(*truth, labels).backward()
    assert all(error(one.grad, other.grad) < 1e-5 for one, other in zip(ours, truth))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("level", [-50.0, 50.0])
def test_equal_logits_cost_the_logarithm_of_their_number(backend: str, dtype: torch.dtype, level: float) -> None:
    hidden, weight, labels, _ = operands()
    flat = torch.zeros_like(weight, dtype=dtype)
    out = fused(hidden.to(dtype), flat, labels, backend, torch.full((CLASSES,), level, dtype=dtype))
    assert torch.allclose(out.nll[labels >= 0].double(), torch.tensor(CLASSES).double().log(), rtol=1e-5)


def test_a_constant_added_to_all_logits_changes_nothing(backend: str) -> None:
    hidden, weight, labels, bias = operands()
    plain, moved = leaves(torch.float32, hidden, weight, bias), leaves(torch.float32, hidden, weight, bias + 100)
    one, other = (fused(*part[:2], labels, backend, part[2]).loss for part in (plain, moved))
    assert float(one.detach()) == pytest.approx(float(other.detach()), rel=2e-5)
    for a, b in zip(torch.autograd.grad(one, plain), torch.autograd.grad(other, moved)):
        assert error(b, a) < 1e-4


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_logits_beyond_the_range_of_the_exponential(backend: str, scale: float) -> None:
    hidden, weight, labels, _ = operands()
    ours, truth = leaves(torch.float32, hidden * scale, weight), leaves(torch.float64, hidden * scale, weight)
    loss, expected = fused(*ours, labels, backend).loss, exact(*truth, labels)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for one, other in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, truth)):
        assert one.isfinite().all() and error(one, other) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_classes_masked_by_minus_infinity(backend: str, dtype: torch.dtype) -> None:
    """A bias of -inf takes a class out of the softmax, as padded vocabularies do."""
    hidden, weight, labels, bias = operands()
    bias[[3, 17, CLASSES - 1]] = -torch.inf
    labels = torch.where((labels == 3) | (labels == 17) | (labels == CLASSES - 1), 5, labels)
    rounded = [tensor.to(dtype) for tensor in (hidden, weight, bias)]
    ours, truth = leaves(dtype, *rounded), leaves(torch.float64, *rounded)
    loss, expected = fused(*ours[:2], labels, backend, ours[2]).loss, exact(*truth[:2], labels, truth[2])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=tolerance)
    for one, other in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, truth)):
        assert error(one, other) < tolerance
    with torch.no_grad():
        assert not torch.isin(fused(*ours[:2], labels, backend, ours[2]).prediction, torch.tensor([3, 17])).any()


def test_not_a_number_in_a_supervised_row_is_seen(backend: str) -> None:
    hidden, weight, labels, _ = operands()
    row, column = (labels >= 0).nonzero()[0].tolist()
    hidden[row, column, 0] = torch.nan
    assert fused(hidden.float(), weight.float(), labels, backend).loss.isnan()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_token_weights(backend: str, dtype: torch.dtype) -> None:
    """Zeros, not-a-number where nothing is supervised, any dtype, strided, and never a gradient of their own."""
    hidden, weight, labels, _ = operands()
    weights = torch.rand(3, 14, dtype=torch.float64)[:, ::2].to(dtype)
    weights[:, ::3] = 0
    weights[labels < 0] = torch.nan
    weights.requires_grad_()
    ours, truth = leaves(torch.float64, hidden, weight), leaves(torch.float64, hidden, weight)
    loss = fused(*ours, labels, backend, token_weights=weights).loss
    known = weights.detach().double().flatten()[labels.flatten() >= 0]
    each = exact(*truth, labels, reduction="none")[labels.flatten() >= 0]
    expected = (known * each).sum() / known.sum()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    loss.backward()
    expected.backward()
    assert weights.grad is None
    assert all(error(one.grad, other.grad) < 1e-6 for one, other in zip(ours, truth))


def test_class_weights_of_one_change_nothing(backend: str) -> None:
    hidden, weight, labels, _ = operands()
    plain, weighted = leaves(torch.float64, hidden, weight), leaves(torch.float64, hidden, weight)
    fused(*plain, labels, backend).loss.backward()
    fused(*weighted, labels, backend, token_weights=torch.ones(CLASSES)[labels.clamp_min(0)]).loss.backward()
    assert all(error(one.grad, other.grad) < 1e-14 for one, other in zip(weighted, plain))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_class_weights_in_every_reduction(reduction: str, ignore_index: int, softcap: float | None) -> None:
    hidden, _, labels, _ = operands()
    labels = torch.where(labels == -100, ignore_index, labels)
    head, weight = nn.Linear(WIDTH, CLASSES).double(), torch.rand(CLASSES, dtype=torch.float64) + 0.1
    states = hidden.requires_grad_()

    def loss() -> Tensor:
        logits = head(states)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        rows = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction}
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **rows)

    expected = loss()
    with fused_cross_entropy(head, negatives=0):
        found = loss()
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    incoming = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).reshape(found.shape)
    wanted = [states, head.weight, head.bias]
    for one, other in zip(
        torch.autograd.grad(found, wanted, incoming), torch.autograd.grad(expected, wanted, incoming)
    ):
        assert error(one, other) < 1e-12


def test_class_weights_with_label_smoothing_are_another_loss() -> None:
    hidden, _, labels, _ = operands()
    head = nn.Linear(WIDTH, CLASSES).double()
    with pytest.raises(ValueError, match="label_smoothing must be 0 with weight"), fused_cross_entropy(head, **PLAIN):
        F.cross_entropy(
            head(hidden).flatten(0, 1), labels.flatten(), weight=torch.rand(CLASSES).double(), label_smoothing=0.1
        )
    with fused_cross_entropy(head, negatives=0, label_smoothing=0.1) as _, pytest.raises(ValueError, match="got both"):
        F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), weight=torch.rand(CLASSES).double())


def test_the_same_hidden_and_weight_in_two_losses(backend: str) -> None:
    """Gradients of two uses add up, as do those of a hidden state that goes on elsewhere."""
    hidden, weight, labels, _ = operands()
    ours, truth = leaves(torch.float64, hidden, weight), leaves(torch.float64, hidden, weight)
    for pair, loss in ((ours, lambda *a: fused(*a, backend).loss), (truth, exact)):
        (loss(*pair, labels) + 0.3 * loss(pair[0], pair[1], labels.roll(1, 0)) + pair[0].square().mean()).backward()
    assert all(error(one.grad, other.grad) < 1e-12 for one, other in zip(ours, truth))


def test_weight_tied_to_the_embedding(backend: str) -> None:
    _, weight, labels, _ = operands()
    tokens = labels.clamp_min(0)
    (ours,), (truth,) = leaves(torch.float64, weight), leaves(torch.float64, weight)
    fused(torch.tanh(F.embedding(tokens, ours)), ours, labels, backend).loss.backward()
    exact(torch.tanh(F.embedding(tokens, truth)), truth, labels).backward()
    assert error(ours.grad, truth.grad) < 1e-12


def test_a_row_does_not_depend_on_its_batch(backend: str) -> None:
    hidden, weight, labels, _ = (tensor.float() if tensor.is_floating_point() else tensor for tensor in operands(6, 9))
    whole = fused(hidden, weight, labels, backend).nll
    for row in range(6):
        alone = fused(hidden[row : row + 1], weight, labels[row : row + 1], backend).nll
        assert torch.allclose(alone[0], whole[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 5, 13, 21, 64])
def test_chunks_that_do_not_divide(rows: int, backend: str) -> None:
    hidden, weight, labels, bias = operands()
    ours, truth = leaves(torch.float32, hidden, weight, bias), leaves(torch.float64, hidden, weight, bias)
    fused(*ours[:2], labels, backend, ours[2], chunk_bytes=rows * CLASSES * 4).loss.backward()
    exact(*truth[:2], labels, truth[2]).backward()
    assert all(error(one.grad, other.grad) < 1e-5 for one, other in zip(ours, truth))


def test_gradcheck(backend: str) -> None:
    hidden, weight, labels, bias = operands(2, 3, 7, 4)
    tensors = leaves(torch.float64, hidden, weight, bias)
    assert torch.autograd.gradcheck(lambda h, w, b: fused(h, w, labels, backend, b).loss, tensors)
    smooth = {"label_smoothing": 0.2, "z_loss": 0.1}
    assert torch.autograd.gradcheck(lambda h, w, b: fused(h, w, labels, backend, b, **smooth).loss, tensors)
    if backend == "torch":
        options = LossOptions(**PLAIN, softcap=1.5)
        assert torch.autograd.gradcheck(lambda h, w, b: token_nll(h, w, labels, bias=b, options=options), tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_autocast(backend: str, dtype: torch.dtype, biased: bool) -> None:
    """Forward and backward inside it, as training loops do; float32 leaves."""
    hidden, weight, labels, bias = operands()
    ours = leaves(torch.float32, hidden, weight, *([bias] if biased else []))
    truth = leaves(torch.float64, hidden, weight, *([bias] if biased else []))
    with torch.autocast("cpu", dtype):
        loss = fused(*ours[:2], labels, backend, *ours[2:]).loss
        loss.backward()
    expected = exact(*truth[:2], labels, *truth[2:])
    expected.backward()
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-2)
    for one, other in zip(ours, truth):
        assert one.grad.dtype == torch.float32 and error(one.grad, other.grad) < 2e-2


def test_a_weight_for_each_loss_of_several(backend: str) -> None:
    """PyTorch's K-dimensional classes ``[C, K, D]`` are one matrix per head here."""
    hidden, _, _, _ = operands()
    weight = torch.randn(3, CLASSES, WIDTH, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (3, 7))
    ours, truth = leaves(torch.float64, hidden, weight), leaves(torch.float64, hidden, weight)
    states = ours[0].unsqueeze(2).expand(-1, -1, 3, -1)
    fused(states, ours[1], labels, backend).loss.backward()
    logits = torch.einsum("btd,kvd->btkv", truth[0], truth[1])
    parts = [logits[:, : 7 - j, j].flatten(0, 1) for j in range(3)]
    targets = [labels[:, j:].flatten() for j in range(3)]
    F.cross_entropy(torch.cat(parts), torch.cat(targets)).backward()
    assert all(error(one.grad, other.grad) < 1e-12 for one, other in zip(ours, truth))


def test_evaluation_costs_no_gradient_and_equals_training(backend: str) -> None:
    hidden, weight, labels, bias = operands()
    ours = leaves(torch.float32, hidden, weight, bias)
    training = fused(*ours[:2], labels, backend, ours[2])
    with torch.inference_mode():
        evaluation = fused(*ours[:2], labels, backend, ours[2])
    assert training.loss.requires_grad and not evaluation.loss.requires_grad
    assert float(evaluation.loss) == pytest.approx(float(training.loss.detach()), rel=1e-6)
    assert torch.equal(evaluation.prediction, training.prediction)


def test_the_page_names_tests_that_exist() -> None:
    page = (Path(__file__).parents[2] / "docs" / "loss-coverage.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)::(\w+)`", page))
    assert len(named) > 40
    for module, name in sorted(named):
        source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
        assert f"\ndef {name}(" in source, f"{module}::{name}"
