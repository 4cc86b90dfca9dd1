"""The one-pass torch backend against the reference: odd, extreme and random shapes, every dtype."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import PARTS, Case, draw, error

from ntpseg import NumItems, ntp_loss
from ntpseg.losses import LossOptions, products

ROW = 17 * 8  # bytes of one row of 17 float64 logits


def agree(case: Case, tolerance: float = 1e-12) -> None:
    truth, *truth_grads = case.run("reference", torch.float64)
    result, *found_grads = case.run("torch")
    for name in PARTS:
        ours, theirs = (float(getattr(out, name).detach()) for out in (result, truth))
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)
    if case.options.z_loss:
        assert float(result.z) == pytest.approx(float(truth.z), rel=tolerance)
    assert torch.equal(result.prediction, truth.prediction)
    assert torch.allclose(result.nll.double(), truth.nll, rtol=tolerance, atol=10 * tolerance)
    assert torch.allclose(result.margin.double(), truth.margin, rtol=tolerance, atol=10 * tolerance)
    for one, other in zip(found_grads, truth_grads):
        assert error(one, other) < 3 * tolerance


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"per_head": True},
        {"k": 1, "slots": 0},
        {"k": 8, "time": 12},
        {"k": 8, "time": 3},
        {"negatives": 0},
        {"negatives": 0, "slots": 0},
        {"negatives": 32, "time": 50},
        {"shift": False},
        {"shift": False, "time": 1, "k": 1},
        {"time": 1, "k": 1},
        {"temperature": 0.3, "tcl_weight": 0.7, "het_weight": 1.9},
        {"tcl_weight": 0.0, "het_weight": 0.0},
        {"head_weights": (0.0, 1.0, 0.25)},
        {"head_weights": (0.0, 1.0, 0.25), "per_head": True, "max_rows": 20},
        {"head_weights": (1.0, 0.0, 0.0), "weighted": True},
        {"weighted": True, "num_items": NumItems([3.5, 2.5, 1.0], 5)},
        {"vocab_range": (5, 6)},
        {"vocab_range": (5, 16), "per_head": True},
        {"classes": 1},
        {"classes": 1031, "width": 3, "scale": 3.0},
        {"num_items": NumItems([7, 5, 3], 2)},
        {"num_items": torch.tensor(11)},
        {"slots": 40},
        {"unsupervised": 0.0},
        {"unsupervised": 0.97},
        {"width": 1},
        {"chunk_bytes": 1},
        {"chunk_bytes": 3 * ROW},
        {"chunk_bytes": 5 * ROW, "per_head": True, "negatives": 9},
        {"z_loss": 0.05},
        {"z_loss": 0.05, "weighted": True, "chunk_bytes": 4 * ROW},
        {"max_rows": 30},
        {"max_rows": 16, "negatives": 7, "slots": 9},
        {"max_rows": 16, "negatives": 7, "slots": 9, "per_head": True},
    ],
    ids=str,
)
def test_equals_the_reference(keywords: dict) -> None:
    agree(draw(**keywords))


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    time=st.integers(1, 14),
    k=st.integers(1, 8),
    width=st.integers(1, 9),
    classes=st.integers(1, 40),
    per_head=st.booleans(),
    slots=st.integers(0, 9),
    unsupervised=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    negatives=st.integers(0, 32),
    shift=st.booleans(),
    temperature=st.sampled_from([0.25, 1.0, 3.0]),
    chunk_bytes=st.sampled_from([None, 1, 2000]),
    weighted=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_equals_the_reference_on_random_cases(**keywords) -> None:
    agree(draw(**keywords))


@pytest.mark.parametrize("gap", [30.0, 100.0, 3000.0])
def test_survives_targets_far_below_the_maximum(gap: float) -> None:
    """exp(z - z[y]) would overflow float32 beyond 88 and float64 beyond 709."""
    case = draw(classes=11, width=4, slots=6)
    case.weight[3] = gap * torch.nn.functional.normalize(case.weight[3], dim=0)
    agree(case)
    case.hidden, case.weight = case.hidden.float(), case.weight.float()
    agree(case, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 6.0])
@pytest.mark.parametrize("per_head", [False, True])
def test_error_is_within_twice_that_of_pytorch(dtype: torch.dtype, scale: float, per_head: bool) -> None:
    case = draw(3, 20, 4, 32, 301, dtype=dtype, scale=scale / 32**0.5, per_head=per_head, slots=6)
    case.options = LossOptions(per_head=True)
    truth, *truth_grads = case.run("reference", torch.float64)
    eager, *eager_grads = case.run("reference")  # logits rounded to dtype, softmax in float32: PyTorch's usual way
    result, *found_grads = case.run("torch")
    floor = torch.finfo(torch.float32).eps
    # rounding may break a near tie, which is PyTorch's lot as well
    wrong, eager_wrong = ((out.head_prediction != truth.head_prediction).float().mean() for out in (result, eager))
    assert wrong <= eager_wrong + 0.02
    assert error(result.nll, truth.nll) <= 2 * error(eager.nll, truth.nll) + floor
    # the rounding of single rows mostly cancels in a mean: by luck, so the rows' own errors are the measure
    typical = float((eager.nll - truth.nll).double().square().mean().sqrt())
    for name in PARTS if wrong == 0 else ("ntp", "nktp", "het"):  # another prediction is another negative
        exact = float(getattr(truth, name).detach())
        ours = abs(float(getattr(result, name).detach()) - exact)
        assert ours <= 2 * typical + 8 * floor * abs(exact), name
    for one, eager_one, truth_one in zip(found_grads, eager_grads, truth_grads):
        assert one.dtype == dtype
        assert error(one, truth_one) <= 2 * error(eager_one, truth_one) + 4 * floor


def test_results_do_not_change_from_run_to_run() -> None:
    case = draw(3, 40, 4, 16, 200, dtype=torch.float32, slots=20, negatives=12)
    first, second = case.run(), case.run()
    assert torch.equal(first[0].loss, second[0].loss)
    assert torch.equal(first[1], second[1]) and torch.equal(first[2], second[2])


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [8, 32])
def test_reads_nothing_uninitialised(
    dtype: torch.dtype, width: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setenv("NTPSEG_DISABLE_NATIVE", "1")
    case = draw(2, 9, 2, width, 19, dtype=dtype, per_head=True, chunk_bytes=200)
    plain = case.run()
    torch.use_deterministic_algorithms(True)  # fills every fresh tensor with not-a-number
    try:
        poisoned = case.run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(plain[0].loss, poisoned[0].loss)
    assert torch.equal(plain[1], poisoned[1]) and torch.equal(plain[2], poisoned[2])


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_does_not_reach_inside(dtype: torch.dtype, softcap: float | None) -> None:
    """The sum over 70,000 classes leaves float16: gradients are those of operands in that dtype without autocast."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 9, 8), torch.randn(70_000, 8) * 0.3
    labels = torch.randint(0, 70_000, (1, 9))
    found = []
    for inside in (True, False):
        leaves = [(x if inside else x.to(dtype)).clone().requires_grad_() for x in (hidden, weight)]
        with torch.autocast("cpu", dtype, enabled=inside):
            options = LossOptions(softcap=softcap, backend="torch")
            ntp_loss(leaves[0], leaves[1], labels, options=options).loss.backward()
        found.append([leaf.grad.to(dtype) for leaf in leaves])
    for one, other in zip(*found):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_more_negatives_take_no_more_than_their_columns() -> None:
    """Equal columns are summed by a table of pairs: of some rows at a time."""
    case = draw(2, 70, 1, 8, 11, negatives=40)
    agree(case)
    before = products._PAIRS
    try:
        products._PAIRS = 50  # less than one row's
        agree(case)
    finally:
        products._PAIRS = before


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_a_second_derivative_is_an_error_and_no_wrong_number(wanted: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 6, 4, requires_grad=wanted[0]), torch.randn(9, 4, requires_grad=wanted[1])
    leaves = [x for x in (hidden, weight) if x.requires_grad]
    labels = torch.randint(0, 9, (1, 6))
    loss = ntp_loss(hidden, weight, labels, backend="torch").loss + sum((x**3).sum() for x in leaves)
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    plain = torch.autograd.grad(
        ntp_loss(hidden, weight, labels, backend="torch").loss + sum((x**3).sum() for x in leaves), leaves
    )
    for one, other in zip(gradients, plain):
        torch.testing.assert_close(one, other)
    with pytest.raises(RuntimeError, match=r"ntp_loss can be differentiated once only.* give backend='reference'"):
        sum(g.square().sum() for g in gradients).backward()


def test_the_loss_per_token_computes_backwards_what_it_did_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A final norm leaves float32 under autocast: both passes multiply in its dtype."""
    module = importlib.import_module("ntpseg.losses.token_nll")
    seen = []

    def evaluate(hidden: torch.Tensor, *arguments: object, **keywords: object) -> object:
        seen.append(hidden.dtype)
        return original(hidden, *arguments, **keywords)

    original = module.evaluate
    monkeypatch.setattr(module, "evaluate", evaluate)
    hidden, weight = torch.randn(1, 6, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        nll = module.token_nll(hidden, weight, torch.randint(0, 20, (1, 6)))
    nll.sum().backward()
    assert seen == [torch.bfloat16] and hidden.grad.dtype == weight.grad.dtype == torch.float32
