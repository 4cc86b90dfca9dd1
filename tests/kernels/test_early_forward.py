"""The forward product launched before the rows are counted: the same bits as after."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[1] / "losses"))

from loss_cases import draw

from ntpseg.kernels import chunk_loop, chunks
from ntpseg.kernels.fused_forward import FusedForward, early_config
from ntpseg.kernels.tl_utils import INTERPRETED
from ntpseg.losses import compaction_triton

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="CPU tensors need Triton's interpreter")


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each segment, whether the loop went on with a product that was launched early."""
    taken = []
    allocate = chunk_loop._Buffers.allocate

    def seen(plan: Any, result: Any, forward: FusedForward | None = None) -> Any:
        taken.append(forward is not None)
        return allocate(plan, result, forward)

    monkeypatch.setattr(chunk_loop._Buffers, "allocate", staticmethod(seen))
    return taken


def _run(keywords: dict[str, Any], change: Any = None) -> list[torch.Tensor]:
    case = draw(width=16, time=40, batch=3, classes=300, **keywords)
    if change:
        change(case.labels)
    out, d_hidden, d_weight = case.run("triton")
    results = (out.loss, out.ntp, out.nktp, out.tcl, out.het, out.prediction, out.nll, out.margin)
    return [*results, d_hidden, d_weight]


def _one_row(labels: torch.Tensor) -> None:
    labels.fill_(-100)
    labels[1, 1] = 7


@pytest.mark.parametrize(
    ("keywords", "change"),
    [
        ({}, None),
        ({"scale": 60.0}, None),
        ({"unsupervised": 0.0}, None),
        ({}, _one_row),
        ({"gradient_filter": 2.0**-8}, None),
        ({"vocab_range": (8, 264), "weighted": True, "head_weights": (1.0, 0.5, 0.0)}, None),
        ({"chunk_bytes": 1 << 20}, None),
    ],
    ids=["plain", "recomputed", "all-rows", "one-row", "filter", "range", "chunk-bytes"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_bits_as_after_the_count(
    keywords: dict[str, Any], change: Any, dtype: torch.dtype, early: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _run({"dtype": dtype, **keywords}, change)
    assert early == [True]
    monkeypatch.setattr(compaction_triton, "early_config", lambda *_: None)
    after = _run({"dtype": dtype, **keywords}, change)
    assert early == [True, False]
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("keywords", [{"per_head": True}, {"max_rows": 120}, {"chunk_bytes": 100_000}], ids=str)
def test_left_to_its_usual_place(keywords: dict[str, Any], early: list[bool]) -> None:
    _run({"dtype": torch.bfloat16, **keywords})
    assert early and not any(early)


def test_no_row() -> None:
    results = _run({"dtype": torch.bfloat16, "unsupervised": 1.0})
    assert results[0] == 0 and not results[-1].any() and not results[-2].any()


@pytest.mark.parametrize("label", [300, -1, 1 << 40])
def test_a_wrong_label_is_refused(label: int) -> None:
    def change(labels: torch.Tensor) -> None:
        labels[1, 4] = label

    with pytest.raises(ValueError, match=rf"labels must be ignore_index or in \[0, 300\), got {label}$"):
        _run({"dtype": torch.bfloat16}, change)


def test_never_more_than_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(320, 64, dtype=torch.bfloat16)
    config = early_config(1, weight, None, 0.0)
    assert config is not None
    row_bytes = chunks.bytes_per_row(320, 64, weight.dtype, fused=True, BLOCK_N=config.BLOCK_N)
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", 100 * row_bytes)
    assert early_config(100, weight, None, 0.0) and not early_config(101, weight, None, 0.0)
    assert not early_config(9, weight.float(), None, 0.0) and not early_config(9, weight[:, 1:], None, 0.0)
