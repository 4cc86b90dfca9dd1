"""The chunk loop over the kernels against float64, for every forward product, dtype, option and trap."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

pytest.importorskip("triton")

from kernel_cases import (
    DESCRIPTORS,
    GRADIENT_ERROR,
    GRADIENTS,
    ROW_RESULTS,
    assert_agrees,
    distance,
    draw_rows,
    run,
    truth,
)

from ntpseg.kernels import chunk_loop, chunks, fused_forward, matmul
from ntpseg.kernels.chunk_loop import LoopOptions
from ntpseg.kernels.tl_utils import INTERPRETED
from ntpseg.losses import triton_backend
from ntpseg.losses.options import LossOptions

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="CPU tensors need Triton's interpreter")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FUSED = LoopOptions(fused=True)


@pytest.mark.parametrize(
    ("dtype", "width", "loop"),
    [
        (F32, 72, None),
        (F32, 72, FUSED),
        (F32, 51, None),
        (BF16, 72, None),
        (BF16, 72, LoopOptions(configs=DESCRIPTORS)),
        (BF16, 200, LoopOptions(configs=DESCRIPTORS)),
        (BF16, 51, None),  # rows that are not 16-byte aligned
        (F16, 72, None),
        (F16, 51, None),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 12.0], ids=["calm", "overflow"])
def test_agrees_with_float64(dtype: torch.dtype, width: int, loop: LoopOptions | None, scale: float) -> None:
    rows, weight = draw_rows(width=width, dtype=dtype, scale=scale, leaders=True)
    options = LossOptions()
    assert_agrees(run(rows, weight, options, loop), truth(rows, weight, options), dtype)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_rows_without_weight_and_padding(dtype: torch.dtype) -> None:
    rows, weight = draw_rows(dtype=dtype, zero_row_weight=True, padding=20, scale=3.0)
    result = run(rows, weight, LossOptions(), FUSED)
    assert_agrees(result, truth(rows, weight, LossOptions()), dtype)
    assert (result.prediction[-20:] == -1).all()
    assert not result.d_hidden[-20:].any()


@pytest.mark.parametrize(
    ("negatives", "hard", "options"),
    [
        (0, 0, {}),
        (1, 0, {}),
        (32, 7, {}),
        (5, 1, {"temperature": 0.4, "tcl_weight": 3.0, "het_weight": 0.5}),
        (5, 2, {"tcl_weight": 0.0}),
        (5, 2, {"z_loss": 0.05}),
    ],
)
def test_options(negatives: int, hard: int, options: dict) -> None:
    rows, weight = draw_rows(negatives=negatives, hard=hard)
    settings = LossOptions(negatives=negatives, **options)
    assert_agrees(run(rows, weight, settings, FUSED), truth(rows, weight, settings), F32)


@pytest.mark.parametrize(("count", "width", "classes"), [(1, 8, 2), (3, 16, 2), (65, 136, 129), (2, 24, 700)])
def test_odd_shapes(count: int, width: int, classes: int) -> None:
    rows, weight = draw_rows(count, width, classes, hard=1)
    assert_agrees(run(rows, weight, LossOptions(), FUSED), truth(rows, weight, LossOptions()), F32)
    assert_agrees(run(rows, weight, LossOptions()), truth(rows, weight, LossOptions()), F32)


def test_a_single_class_leaves_nothing_to_learn() -> None:
    rows, weight = draw_rows(9, 16, 1, hard=0)
    result = run(rows, weight, LossOptions(), FUSED)
    assert not result.prediction.any() and not result.margin.any()
    assert result.nll.max() < 1e-6 and result.d_hidden.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_chunks_change_nothing_but_rounding(dtype: torch.dtype) -> None:
    rows, weight = draw_rows(dtype=dtype, leaders=True)
    whole = run(rows, weight, LossOptions(), FUSED)
    cut = run(rows, weight, LossOptions(), LoopOptions(fused=True, chunk_bytes=384 * dtype.itemsize * 50))
    assert torch.equal(whole.prediction, cut.prediction)
    # a CPU's products may add up in another order where a row lies elsewhere in its block
    for name in (*ROW_RESULTS, "d_hidden"):
        assert distance(getattr(cut, name), getattr(whole, name).double()) < GRADIENT_ERROR[dtype] / 3, name
    # the sum over chunks is formed in fp32: it must not lose to a single product
    assert distance(cut.d_weight, truth(rows, weight, LossOptions()).d_weight) < GRADIENT_ERROR[dtype]


@pytest.mark.parametrize("filtered", [0.0, 1e-9])
def test_weight_gradient_summed_in_a_split_accumulator(filtered: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", 40_000)
    monkeypatch.setattr(matmul, "SLICE_BYTES", 4 * 72 * 200)  # two slices, or three of whole tiles
    rows, weight = draw_rows(dtype=BF16, leaders=True)
    loop = LoopOptions(fused=True, chunk_bytes=384 * 2 * 50, gradient_filter=filtered)
    planned = []
    monkeypatch.setattr(
        chunk_loop, "plan_chunks", lambda *a, **k: planned.append(chunks.plan_chunks(*a, **k)) or planned[-1]
    )
    result, expected = run(rows, weight, LossOptions(), loop), truth(rows, weight, LossOptions())
    assert planned == [chunks.Chunks(47, 3, split_accumulator=True)]
    assert_agrees(result, expected, BF16)
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", 1 << 30)
    in_fp32 = run(rows, weight, LossOptions(), loop)
    assert planned[1] == chunks.Chunks(47, 3)
    # the same sum but for its 17th bit: hardly a number rounds to another bf16
    assert (result.d_weight != in_fp32.d_weight).float().mean() < 0.01
    assert torch.equal(result.d_hidden, in_fp32.d_hidden)


@pytest.mark.parametrize("width", [51, 4])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_unaligned_rows_are_padded(dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weight = draw_rows(width=width, dtype=dtype, scale=3.0)
    widths = []
    launch = fused_forward.anchored_gemm
    monkeypatch.setattr(
        fused_forward, "anchored_gemm", lambda h, w, *a: widths.append((h.shape[1], w.shape[1])) or launch(h, w, *a)
    )
    assert_agrees(run(rows, weight, LossOptions()), truth(rows, weight, LossOptions()), dtype)
    assert set(widths) == {(-(-width // 8) * 8,) * 2}


def test_repeats_bit_for_bit() -> None:
    rows, weight = draw_rows(dtype=BF16, scale=12.0, leaders=True)
    first, second = run(rows, weight, LossOptions()), run(rows, weight, LossOptions())
    for name in ("prediction", *ROW_RESULTS, *GRADIENTS):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_never_writes_to_its_inputs() -> None:
    rows, weight = draw_rows(dtype=BF16, scale=12.0)
    before = [
        x.clone() for x in (rows.hidden, weight, rows.target, rows.row_weight, rows.hard_tokens, rows.num_negatives)
    ]
    run(rows, weight, LossOptions())
    for x, y in zip(
        (rows.hidden, weight, rows.target, rows.row_weight, rows.hard_tokens, rows.num_negatives), before, strict=True
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("hidden_grad", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_makes_only_the_gradients_that_are_wanted(hidden_grad: bool, fused: bool) -> None:
    rows, weight = draw_rows()
    expected = truth(rows, weight, LossOptions())
    result = triton_backend.rows_loss(
        rows,
        weight,
        LossOptions(),
        hidden_grad=hidden_grad,
        weight_grad=not hidden_grad,
        loop=LoopOptions(fused=fused),
    )
    made, missing = GRADIENTS if hidden_grad else GRADIENTS[::-1]
    assert getattr(result, missing) is None
    assert distance(getattr(result, made), getattr(expected, made)) < GRADIENT_ERROR[F32]
    neither = triton_backend.rows_loss(
        rows, weight, LossOptions(), hidden_grad=False, weight_grad=False, loop=LoopOptions(fused=fused)
    )
    assert neither.d_hidden is None and neither.d_weight is None
    assert torch.equal(neither.nll, result.nll) and torch.equal(neither.prediction, result.prediction)


def test_a_slice_of_a_larger_weight() -> None:
    rows, weight = draw_rows(classes=200)
    larger = torch.full((500, weight.shape[1] + 8), math.nan)
    larger[120:320, : weight.shape[1]] = weight
    part = larger[120:320, : weight.shape[1]]
    assert not part.is_contiguous()
    assert_agrees(run(rows, part, LossOptions(), FUSED), truth(rows, weight, LossOptions()), F32)


@pytest.mark.parametrize("fused", [True, False])
def test_ties_go_to_the_lowest_id(fused: bool) -> None:
    rows, weight = draw_rows(count=40, classes=300, scale=3.0)
    # whole numbers: their sums are exact in whatever order a CPU's product adds them up
    rows = dataclasses.replace(rows, hidden=rows.hidden.round())
    weight = (2 * weight[:1]).round().expand(300, -1).contiguous()
    result = run(rows, weight, LossOptions(), LoopOptions(fused=fused))
    assert not result.prediction.any()
    assert result.margin.max() < 1e-5
    assert not result.margin[rows.target == 0].any()
    torch.testing.assert_close(result.nll, torch.full((40,), math.log(300.0)))


@pytest.mark.parametrize("fused", [True, False])
def test_nan_stays_visible(fused: bool) -> None:
    rows, weight = draw_rows(count=70)
    hidden = rows.hidden.clone()
    hidden[3, 5] = math.nan
    result = run(dataclasses.replace(rows, hidden=hidden), weight, LossOptions(), LoopOptions(fused=fused))
    assert result.nll[3].isnan()
    assert result.d_hidden[3].isnan().any()
    assert not result.nll[30:].isnan().any()


def test_float64_goes_to_the_torch_backend() -> None:
    rows, weight = draw_rows(count=20)
    exact = dataclasses.replace(
        rows, hidden=rows.hidden.double(), row_weight=rows.row_weight.double(), entry_weight=rows.entry_weight.double()
    )
    result = run(exact, weight.double(), LossOptions())
    assert result.nll.dtype == torch.float64
    assert distance(result.d_weight, truth(rows, weight, LossOptions()).d_weight) < 1e-12
