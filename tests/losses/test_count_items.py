"""`count_items`: micro-batches divided by its counts add up to the whole batch, whatever the cuts and options."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import PARTS, Case, draw, error

from ntpseg import HardTokens, NumItems, ntp_loss
from ntpseg.losses import count_items


def counts(case: Case, part: slice = slice(None)) -> NumItems:
    """Those of some samples of a case."""
    options, weights = case.options, case.tensors.get("token_weights")
    return count_items(
        case.labels[part],
        case.hidden.shape[2],
        het=hard(case, part),
        vocab_range=options.vocab_range,
        ignore_index=options.ignore_index,
        shift=options.shift,
        token_weights=None if weights is None else weights[part],
    )


def hard(case: Case, part: slice) -> HardTokens | None:
    """Hard tokens of some samples."""
    het = case.tensors.get("het")
    return None if het is None else HardTokens(het.position[part], het.token[part])


def accumulated(case: Case, cuts: list[int], backend: str) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
    """Parts of the loss and gradients, added up over micro-batches that end before these samples."""
    edges = sorted({0, *cuts, len(case.labels)})
    parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
    each = [counts(case, part) for part in parts]
    total = NumItems(sum(count.rows for count in each), sum(count.het for count in each))
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    result = dict.fromkeys(PARTS, 0.0)
    weights = case.tensors.get("token_weights")
    for part in parts:
        out = ntp_loss(
            hidden[part],
            weight,
            case.labels[part],
            het=hard(case, part),
            token_weights=None if weights is None else weights[part],
            num_items=total,
            options=case.options.with_backend(backend),
        )
        out.loss.backward()
        for name in PARTS:
            result[name] += float(getattr(out, name).detach())
    return result, hidden.grad, weight.grad


cases = {
    "batch": st.integers(1, 6),
    "time": st.integers(1, 12),
    "k": st.integers(1, 5),
    "per_head": st.booleans(),
    "slots": st.integers(0, 7),
    "unsupervised": st.sampled_from([0.0, 0.4, 0.9]),
    "negatives": st.integers(0, 4),
    "shift": st.booleans(),
    "weighted": st.booleans(),
    # hard tokens are drawn from all 17 classes: some of them lie outside
    "vocab_range": st.sampled_from([None, (0, 17), (3, 9), (5, 6)]),
    "ignore_index": st.sampled_from([-100, -1]),
    "temperature": st.sampled_from([0.5, 1.0]),
    "seed": st.integers(0, 10_000),
}


@settings(max_examples=80, deadline=None)
@given(cuts=st.lists(st.integers(1, 5), max_size=4), **cases)
def test_accumulation_over_random_cuts_is_the_whole(cuts: list[int], **keywords: Any) -> None:
    """Gradients by the reference; the counts that each call takes of its own batch are the same rule."""
    case = draw(**keywords)
    whole, d_hidden, d_weight = case.run("reference")
    for backend in ("reference", "torch"):
        result, f_hidden, f_weight = accumulated(case, cuts, backend)
        for name in PARTS:
            assert result[name] == pytest.approx(float(getattr(whole, name).detach()), rel=1e-11, abs=1e-11), name
        assert error(f_hidden, d_hidden) < 1e-11 and error(f_weight, d_weight) < 1e-11


def test_counts_are_those_of_the_definition() -> None:
    labels = torch.tensor([[-100, 5, 6, -100, 7], [6, -100, -100, 5, 6]])
    result = count_items(labels, 3)
    assert result.rows.tolist() == [5.0, 4.0, 3.0] and result.rows.dtype == torch.float64
    assert float(result.het) == 0
    assert count_items(labels, 3, shift=False).rows.tolist() == [6.0, 5.0, 4.0]
    assert count_items(labels.abs(), 2, ignore_index=5).rows.tolist() == [6.0, 5.0]
    weights = torch.arange(10.0).view(2, 5)
    assert count_items(labels, 2, token_weights=weights).rows.tolist() == [1 + 2 + 4 + 8 + 9, 2 + 4 + 8 + 9]


def test_a_hard_token_counts_where_it_is_supervised_wrong_and_in_range() -> None:
    labels = torch.tensor([[5, 6, -100, 7]])
    # right, wrong, unsupervised, outside the range, before the first row, empty slot, beyond the end
    het = HardTokens(torch.tensor([[1, 1, 2, 3, 0, -1, 4]]), torch.tensor([[6, 5, 5, 9, 6, -1, 5]]))
    assert float(count_items(labels, 1, het=het).het) == 2
    assert float(count_items(labels, 1, het=het, vocab_range=(5, 9)).het) == 1
    assert float(count_items(labels, 1, het=het, vocab_range=(5, 9), shift=False).het) == 2
    labels = torch.tensor([[5, 6, 8, 7]])
    assert float(count_items(labels, 1, het=het, vocab_range=(5, 10), ignore_index=7).het) == 2


@pytest.mark.parametrize("keywords", [{}, {"vocab_range": (5, 14), "weighted": True}, {"shift": False, "slots": 9}])
def test_kernels_count_alike(keywords: dict[str, Any]) -> None:
    """The Triton kernels count while they compact, by the same rule."""
    pytest.importorskip("triton")
    from ntpseg.kernels.compaction import BatchLayout, find_supervised
    from ntpseg.kernels.hard_tokens import rank_hard_tokens
    from ntpseg.kernels.tl_utils import INTERPRETED

    if not INTERPRETED:
        pytest.skip("CPU tensors need Triton's interpreter")
    case = draw(5, 13, dtype=torch.float32, **keywords)
    options, het = case.options, case.tensors["het"]
    low, high = options.vocab_range or (0, 17)
    layout = BatchLayout(3, 5, 13, int(options.shift), options.ignore_index, low, high - low)
    cells = find_supervised(case.labels, case.tensors.get("token_weights"), layout)
    rank_hard_tokens(het.position, het.token, case.labels, cells, layout)
    expected = counts(case)
    torch.testing.assert_close(cells.token_weight.view(3, -1).sum(1).double(), expected.rows, rtol=1e-6, atol=0)
    assert int(cells.status[2]) == float(expected.het) > 0


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("k must be an integer >= 1, got 0", {"k": 0}),
        ("labels must be an int64", {"labels": torch.zeros(3)}),
        ("labels must be an int64", {"labels": torch.zeros(2, 3)}),
        ("vocab_range must", {"vocab_range": (4, 2)}),
        ("token_weights must be a float", {"token_weights": torch.ones(2, 4)}),
        ("het.position must be an int64", {"het": HardTokens(torch.zeros(1, 2).long(), torch.zeros(1, 2).long())}),
    ],
)
def test_refused(message: str, arguments: dict[str, Any]) -> None:
    call = {"labels": torch.zeros(2, 3, dtype=torch.int64), "k": 2} | arguments
    with pytest.raises(ValueError, match=f"^{message}"):
        count_items(call.pop("labels"), call.pop("k"), **call)
