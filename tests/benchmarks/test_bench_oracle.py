"""The truth of the loss benchmark is the package's definition, and the composed baselines compute it too."""

from __future__ import annotations

import pytest
import torch

from benchmarks import composed, loss
from benchmarks.harness import Inaccurate, relative_error
from benchmarks.operands import Operands, Shape
from benchmarks.oracle import truth
from benchmarks.verifier import FULL, LIMITS, OURS_OVER_EAGER, Verifier
from ntpseg import ntp_loss

CPU = torch.device("cpu")


def _operands(logits: str = "peaked", heads: int = 2, dtype: str = "float64") -> Operands:
    return Operands.random(Shape(32, 12, 40, heads, 3, logits, dtype), CPU)


@pytest.mark.parametrize("logits", ["random", "peaked"])
def test_truth_is_the_reference(logits: str) -> None:
    operands = _operands(logits)
    hidden, weight = operands.hidden.requires_grad_(), operands.weight.requires_grad_()
    out = ntp_loss(hidden, weight, operands.labels, negatives=3, het=operands.het, backend="reference")
    out.loss.backward()
    operands.hidden, operands.weight = hidden.detach(), weight.detach()
    result = truth(operands, terms=True)
    assert float(result.loss) == pytest.approx(float(out.loss.detach()), rel=1e-12)
    assert relative_error(hidden.grad[operands.index], result.d_rows) < 1e-12
    assert relative_error(weight.grad, result.d_weight) < 1e-12
    assert result.gap == 0.0
    plain = truth(operands, terms=False)
    assert float(plain.loss) == pytest.approx(float(out.nktp), rel=1e-12)


def test_composed_baselines_agree() -> None:
    operands = _operands()
    rows, weight, target = operands.rows.detach(), operands.weight.detach(), operands.target
    whole, first = composed.full_loss(rows, weight, target, *operands.predecessors, *operands.hard)
    terms, second = composed.tcl_het(operands, rows, weight)
    assert torch.equal(first, second)
    # they compute in float32
    assert float(whole) == pytest.approx(float(truth(operands, terms=True).loss), rel=1e-5)
    assert float(terms + composed.cross_entropy(rows, weight, target)) == pytest.approx(float(whole), rel=1e-5)


def test_peaked_logits_are_those_of_a_trained_model() -> None:
    operands = Operands.random(Shape(4096, 64, 500, logits="peaked", dtype="float32"), CPU)
    logits = operands.rows @ operands.weight.t()
    assert 0.8 < float((logits.argmax(1) == operands.target).float().mean()) < 0.92
    assert float(logits.amax(1).median()) > 10


def test_negatives_come_from_the_given_predictions() -> None:
    operands = _operands("random")
    prediction = truth(operands, terms=True).prediction
    other = truth(operands, terms=True, prediction=(prediction + 1) % 40)
    assert other.gap > 0
    assert float(other.loss) != pytest.approx(float(truth(operands, terms=True).loss), rel=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ours_passes_the_gate(backend: str) -> None:
    operands = Operands.random(Shape(16, 16, 40, 1, 2, "peaked", "float32"), CPU)
    verifier = Verifier(operands)
    assert verifier.errors(loss.ours(operands, backend), FULL)["d_weight"] < 1e-5


@pytest.mark.parametrize("part", ["loss", "d_hidden", "d_weight"])
@pytest.mark.parametrize("damage", [lambda x: x * 1.01, lambda x: x * float("nan")])
def test_wrong_results_do_not_pass_the_gate(part: str, damage: object) -> None:
    operands = Operands.random(Shape(16, 16, 40, 1, 2, "random", "float32"), CPU)
    right = loss.baseline(operands, composed.full_loss)

    def step() -> dict[str, torch.Tensor | None]:
        result = right()
        return result | {part: damage(result[part])}  # type: ignore[operator]

    with pytest.raises(Inaccurate, match=part):
        Verifier(operands).errors(step, FULL)


def test_ours_may_have_twice_the_error_of_pytorch_at_most() -> None:
    operands = Operands.random(Shape(16, 16, 40, 1, 2, "random", "bfloat16"), CPU)
    verifier = Verifier(operands)
    verifier.errors(loss.baseline(operands, composed.full_loss), FULL)
    step = loss.ours(operands, "torch")
    verifier.errors(step, FULL)
    limit = OURS_OVER_EAGER * verifier.eager["d_weight"]
    assert limit < LIMITS["bfloat16"]["d_weight"]

    def worse() -> dict[str, object]:
        result = step()
        return result | {"d_weight": result["d_weight"] * (1 + 1.5 * limit)}

    worse.rows_of = step.rows_of  # type: ignore[attr-defined]
    with pytest.raises(Inaccurate, match="d_weight"):
        verifier.errors(worse, FULL)
