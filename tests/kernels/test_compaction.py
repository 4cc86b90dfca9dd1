"""Compaction by kernels equals compaction in plain PyTorch, row by row and on the way back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[1] / "losses"))

from loss_cases import Case, draw

from ntpseg.kernels import gather_scatter
from ntpseg.kernels.compaction import BatchLayout, find_supervised, write_rows
from ntpseg.kernels.gather_scatter import gather_rows, gather_rows_dot, zero_missing_rows
from ntpseg.kernels.tl_utils import INTERPRETED, LOG2E
from ntpseg.losses import LossOptions, compaction_triton
from ntpseg.losses.compaction import Compaction, compact
from ntpseg.losses.compaction_triton import TritonCompaction, compact_triton
from ntpseg.losses.supervision import Supervision

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="CPU tensors need Triton's interpreter")


def _both(case: Case, per_head: bool, counts: Any = (None, None)) -> tuple[Compaction, TritonCompaction]:
    options: LossOptions = case.options
    low, high = options.vocab_range or (0, case.weight.shape[-2])
    het = case.tensors.get("het")
    supervision = Supervision(
        labels=case.labels,
        het_position=het.position if het else None,
        het_token=het.token if het else None,
        token_weights=case.tensors.get("token_weights"),
        num_rows=counts[0],
        num_het=counts[1],
    )
    arguments = case.hidden, supervision, high - low, options
    return compact(*arguments, per_head_weight=per_head), compact_triton(*arguments, per_head_weight=per_head)


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"per_head": True},
        {"k": 1, "slots": 0, "negatives": 0},
        {"k": 8, "time": 12, "negatives": 32, "slots": 70},
        {"k": 8, "time": 5, "per_head": True},  # heads that never predict anything
        {"head_weights": (0.0, 1.0, 0.5), "weighted": True},
        {"vocab_range": (5, 14)},
        {"shift": False, "slots": 9},
        {"max_rows": 18},
        {"max_rows": 18, "per_head": True, "shift": False},
        {"max_rows": 15, "vocab_range": (5, 14), "weighted": True},
        {"unsupervised": 1.0},
        {"unsupervised": 1.0, "max_rows": 5},
        {"unsupervised": 0.0, "batch": 1, "time": 3},
        {"batch": 70, "time": 40, "slots": 3, "negatives": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_plain(keywords: dict[str, Any], dtype: torch.dtype) -> None:
    case = draw(dtype=dtype, **keywords)
    plain, kernels = _both(case, bool(keywords.get("per_head")))
    a, b = plain.rows, kernels.rows
    assert a.segments == b.segments
    real = a.index >= 0
    for name in ("target", "num_negatives", "hard_tokens", "index"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert getattr(a, name).dtype == getattr(b, name).dtype
    assert torch.equal(a.hidden[real], b.hidden[real]) and not b.hidden[~real].any()
    for left, right in (
        (a.row_weight, b.row_weight),
        (a.entry_weight, b.entry_weight),
        (plain.ntp_weight, kernels.ntp_weight),
    ):
        torch.testing.assert_close(left, right, rtol=3e-7, atol=0)

    count = len(a.target)
    prediction = torch.where(real, torch.arange(count), -1)
    nll, margin = torch.rand(2, count).masked_fill(~real, 0.0)
    low = case.options.vocab_range[0] if case.options.vocab_range else 0
    result, expected = (each.scatter_results(prediction, nll, margin, low) for each in (kernels, plain))
    for left, right in zip(result, expected, strict=True):
        assert left.dtype == right.dtype and torch.equal(left, right)
    d_rows = torch.randn(count, case.hidden.shape[-1]).to(dtype) * real.unsqueeze(1)
    assert torch.equal(kernels.scatter_gradient(d_rows), plain.scatter_gradient(d_rows))


def test_given_counts_replace_those_of_the_batch() -> None:
    case = draw(dtype=torch.float32, head_weights=(0.5, 1.0, 2.0))
    plain, kernels = _both(case, False, (torch.tensor([40.0, 0.0, 20.0]).double(), torch.tensor(7.0).double()))
    torch.testing.assert_close(plain.rows.row_weight, kernels.rows.row_weight, rtol=3e-7, atol=0)
    assert kernels.rows.entry_weight == plain.rows.entry_weight


@pytest.mark.parametrize("label", [17, -1, 1 << 40])
def test_a_label_out_of_range_is_named(label: int) -> None:
    case = draw(dtype=torch.float32)
    case.labels[1, 4] = label
    with pytest.raises(ValueError, match=rf"labels must be ignore_index or in \[0, 17\), got {label}$"):
        _both(case, False)
    options = LossOptions(max_rows=18)
    with pytest.raises(ValueError, match=rf"labels must be ignore_index or in \[0, 17\), got {label}$"):
        compact_triton(case.hidden, Supervision(case.labels), 17, options, per_head_weight=False)


@pytest.mark.parametrize("label", [17, -1, 1 << 40])
def test_a_label_out_of_range_has_no_target_until_it_is_refused(label: int) -> None:
    """Kernels that read the weight at the target may run before the host sees the label."""
    labels = torch.tensor([[0, 3, label, -100, 5]])
    layout = BatchLayout(heads=2, batch=1, time=5, shift=1, ignore_index=-100, class_start=0, classes=17)
    cells = find_supervised(labels, None, layout)
    assert layout.max_supervised == 7
    table = write_rows(labels, cells, torch.ones(2), None, None, layout, 5, 7, segments=False)
    assert table.target.tolist() == [3, -1, 5, -1, 5, -1, -1]
    assert table.gather_index.tolist() == [0, 2, 6, 1, 5, -1, -1]
    assert table.num_negatives.tolist()[5:] == [0, 0] and not table.row_weight[5:].any()
    assert table.counts.tolist()[5:] == [3, 5] and table.counts[0] > 0


@pytest.mark.parametrize("keywords", [{}, {"per_head": True}, {"unsupervised": 1.0}], ids=str)
def test_rows_gathered_after_the_count_are_the_same(keywords: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    case = draw(dtype=torch.float32, **keywords)
    gathers = []
    gather = compaction_triton.gather_rows
    monkeypatch.setattr(compaction_triton, "gather_rows", lambda s, i: gathers.append(len(i)) or gather(s, i))
    _, early = _both(case, bool(keywords.get("per_head")))
    monkeypatch.setattr(compaction_triton, "EARLY_SHARE", 1 << 40)
    _, late = _both(case, bool(keywords.get("per_head")))
    assert torch.equal(early.rows.hidden, late.rows.hidden) and early.rows.segments == late.rows.segments
    assert gathers == [2 * (8 + 7 + 6), len(late.rows.target)]


def test_more_rows_than_promised_are_an_error() -> None:
    case = draw(dtype=torch.float32, unsupervised=0.0)
    with pytest.raises(ValueError, match=r"^max_rows must be at least the supervised rows"):
        compact_triton(case.hidden, Supervision(case.labels), 17, LossOptions(max_rows=3), per_head_weight=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gather_rows(dtype: torch.dtype) -> None:
    source = torch.randn(50, 24).to(dtype)[:, :19]
    index = torch.tensor([49, -1, 0, 7, 7], dtype=torch.int32)
    expected = source[index.clamp_min(0)] * (index >= 0).unsqueeze(1)
    assert torch.equal(gather_rows(source, index), expected)
    assert gather_rows(source, index[:0]).shape == (0, 19)


@pytest.mark.parametrize("layout", ["contiguous", "heads-first", "sliced", "expanded"])
@pytest.mark.parametrize("wide", [False, True])
def test_gather_rows_of_any_strides(layout: str, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if wide:  # 64-bit offsets, as beyond 2**31 entries
        monkeypatch.setattr(gather_scatter, "_reach", lambda x: 1 << 31)
    source = {
        "contiguous": torch.randn(2, 5, 3, 20),
        "heads-first": torch.randn(3, 2, 5, 20).permute(1, 2, 0, 3),
        "sliced": torch.randn(2, 9, 4, 24)[:, 2:7, 1:, :20],
        "expanded": torch.randn(2, 5, 1, 20).expand(2, 5, 3, 20),
    }[layout]
    index = torch.cat([torch.randperm(30), torch.tensor([-1])])
    expected = torch.cat([source.reshape(30, 20)[index[:-1]], torch.zeros(1, 20)])
    assert torch.equal(gather_rows(source, index), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("width", [1100, 19])
def test_logits_of_targets_in_the_pass_that_gathers(dtype: torch.dtype, per_head: bool, width: int) -> None:
    source = torch.randn(2, 4, 3, width).to(dtype)
    weight = torch.randn(*([3] if per_head else []), 7, width + 5).to(dtype)[..., :width]
    index = torch.cat([torch.randperm(24), torch.tensor([-1, 5, 6])])
    target = torch.randint(0, 7, (27,))
    source[0, 1, 2] = torch.nan  # row 5, whose target is missing at the end
    target[24:] = torch.tensor([3, -1, 7])
    hidden, anchors = gather_rows_dot(source, index, weight, target, 48.0)
    logit = anchors.target_logit
    assert torch.equal(hidden.isnan(), gather_rows(source, index).isnan())
    assert torch.equal(hidden.nan_to_num(), gather_rows(source, index).nan_to_num())
    chosen = weight[index % 3, target.clamp(0, 6)] if per_head else weight[target.clamp(0, 6)]
    expected = (hidden.double() * chosen.double()).sum(1)
    expected[24:] = 0
    torch.testing.assert_close(logit.double(), expected, rtol=1e-5, atol=2e-5, equal_nan=True)
    assert logit[24:].tolist() == [0, 0, 0]
    known = ~logit.isnan()
    assert torch.equal(anchors.anchor[known], (logit * LOG2E.value)[known])
    assert torch.equal(anchors.limit[known], (logit + 48.0)[known])
    none = gather_rows_dot(source, index[:0], weight, target[:0], 48.0)
    assert none[0].shape == (0, width) and none[1].limit.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_missing_rows_are_zeroed_and_no_others(dtype: torch.dtype) -> None:
    out = torch.full((70, 30), torch.nan, dtype=dtype)
    index = torch.arange(70, dtype=torch.int32).masked_fill(torch.rand(70) < 0.5, -1)
    zero_missing_rows(out, index)
    assert torch.equal(out.isnan().all(1), index >= 0) and not out[index < 0].any()
