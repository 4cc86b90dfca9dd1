"""The native CPU passes against plain products in float64, at odd sizes; and the loss with and without them."""

from __future__ import annotations

import pytest
import torch
from loss_cases import draw, error

from ntpseg.ops import loss_cpu

blocks = pytest.mark.skipif(loss_cpu.level() < 2, reason="needs AMX with bfloat16 and the extension")
SHAPES = [(1, 32, 1), (5, 32, 31), (33, 64, 97), (64, 96, 512), (150, 32, 1031), (700, 64, 600), (31, 544, 1056)]


@pytest.fixture(params=["avx512", "avx2"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run on this instruction set, or the best below it that the processor has."""
    monkeypatch.setenv("NTPSEG_CPU_ISA", request.param)
    if loss_cpu.level() < 1:
        pytest.skip("needs AVX2 with FMA and the extension")
    return request.param


def test_the_level_follows_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = []
    for asked in ("baseline", "avx2", "avx512"):
        monkeypatch.setenv("NTPSEG_CPU_ISA", asked)
        levels.append(loss_cpu.level())
    assert levels[0] == 0 and levels[1] <= 1 and levels == sorted(levels)
    monkeypatch.setenv("NTPSEG_DISABLE_NATIVE", "1")
    assert loss_cpu.level() == 0


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 300])
def test_a_pass_over_a_tile(length: int, isa: str) -> None:
    whole = torch.randn(9, 400) * 10
    tile = whole[:, 7 : 7 + length]
    anchor, gap = torch.randn(9), tile.clone()
    gap -= anchor.unsqueeze(1)
    row_max, argmax, row_sum = torch.full((9,), 2.0), torch.full((9,), 3), torch.ones(9)
    around = whole[:, :7].clone(), whole[:, 7 + length :].clone()
    loss_cpu.exponentials_(tile, anchor, row_max, argmax, row_sum, 100)
    assert torch.equal(whole[:, :7], around[0]) and torch.equal(whole[:, 7 + length :], around[1])
    assert torch.allclose(tile.double(), gap.double().exp(), rtol=1e-6, atol=0)
    expected, where = gap.max(1)
    assert torch.equal(row_max, expected.clamp_min(2.0))
    assert torch.equal(argmax, torch.where(expected > 2.0, where + 100, 3))
    assert torch.allclose(row_sum.double(), 1 + gap.double().exp().sum(1), rtol=1e-5)


def test_exponentials_are_within_two_units_in_the_last_place(isa: str) -> None:
    tile = torch.linspace(-87.3, 88.7, 16 * 5001).reshape(16, 5001)
    tile[0] = torch.logspace(-30, 1, 5001)
    exact = tile.double().exp()
    anchor, row_max, row_sum = torch.zeros(3, 16)
    loss_cpu.exponentials_(tile, anchor, row_max, torch.zeros(16, dtype=torch.int64), row_sum, 0)
    unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 24)
    assert float(((tile.double() - exact).abs() / unit).max()) < 2


@pytest.mark.parametrize("at", [0, 5, 8, 16, 20])
def test_extremes_in_whole_vectors_and_in_the_tail(at: int, isa: str) -> None:
    extremes = torch.tensor([-torch.inf, -500.0, -104.0, -100.0, 88.7, 89.0, 93076376.0, 1e38, torch.inf, torch.nan])
    for value in extremes.tolist():
        tile = torch.zeros(1, 21)
        tile[0, at] = value
        row_max, argmax, row_sum = torch.full((1,), -torch.inf), torch.zeros(1, dtype=torch.int64), torch.zeros(1)
        loss_cpu.exponentials_(tile, torch.zeros(1), row_max, argmax, row_sum, 3)
        expected = torch.tensor(value).exp()
        assert torch.isclose(tile[0, at], expected, rtol=1e-6, atol=2e-45, equal_nan=True)
        assert torch.isclose(row_sum, 20 + expected, rtol=1e-6, equal_nan=True)
        first_zero = 3 if at else 4  # the maximum passes over not-a-number
        assert (float(row_max), int(argmax)) == ((value, at + 3) if value > 0 else (0.0, first_zero))


@pytest.mark.parametrize("columns", [(2, 13), (13, 2, 34), (9, 25), (32, 34)])
def test_the_first_of_equal_maxima_is_taken(columns: tuple[int, ...], isa: str) -> None:
    tile = torch.randn(1, 35).clamp_max(1)
    tile[0, list(columns)] = 2.0
    row_max, argmax, row_sum = torch.full((1,), -torch.inf), torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    loss_cpu.exponentials_(tile, torch.zeros(1), row_max, argmax, row_sum, 0)
    assert (float(row_max), int(argmax)) == (2.0, min(columns))


def test_extremes_and_ties(isa: str) -> None:
    tile = torch.tensor([[-torch.inf, -500.0, 80.0, 80.0], [torch.nan, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    row_max, argmax, row_sum = torch.full((3,), -torch.inf), torch.zeros(3, dtype=torch.int64), torch.zeros(3)
    loss_cpu.exponentials_(tile, torch.zeros(3), row_max, argmax, row_sum, 0)
    assert tile[0, 0] == 0 and tile[0, 1] == 0 and tile[0, 2] == pytest.approx(5.540622e34)
    assert argmax.tolist() == [2, 2, 0]
    assert row_sum[1].isnan() and row_sum[2] == 4


@blocks
@pytest.mark.parametrize(("rows", "width", "classes"), SHAPES)
@pytest.mark.parametrize("strided", [False, True])
def test_exponentials_of_a_block(rows: int, width: int, classes: int, strided: bool) -> None:
    hidden = torch.randn(rows, width + 64 * strided).bfloat16()[:, :width]
    matrix = (torch.randn(classes, width + 32 * strided) / width**0.5).bfloat16()[:, :width]
    column = torch.randint(-1, classes, (rows,))
    z = hidden.double() @ matrix.double().t()
    exact = torch.where(column < 0, 0.0, z.gather(1, column.clamp_min(0).unsqueeze(1)).squeeze(1)).float() + 0.5
    anchor = torch.randn(rows)
    block = torch.full((rows, classes + 3), 7.0, dtype=torch.bfloat16)
    row_max, argmax, row_sum = loss_cpu.block_exponentials(hidden, matrix, anchor, column, exact, block[:, :classes])
    here = (column >= 0).nonzero().squeeze(1)
    z[here, column[here]] = exact[here].double()
    gap = z - anchor.double().unsqueeze(1)
    assert (block[:, classes:] == 7).all()
    assert torch.allclose(block[:, :classes].double(), gap.exp(), rtol=2**-8 + 1e-5, atol=1e-30)
    assert torch.allclose(row_max.double(), gap.amax(1), atol=1e-5)
    assert torch.allclose(gap.gather(1, argmax.unsqueeze(1)).squeeze(1), gap.amax(1), atol=1e-5)
    assert torch.allclose(row_sum.double(), gap.exp().sum(1), rtol=1e-5)
    reduced = loss_cpu.block_exponentials(hidden, matrix, anchor, column, exact, None)
    assert all(torch.equal(one, other) for one, other in zip(reduced, (row_max, argmax, row_sum)))


@blocks
@pytest.mark.parametrize(("rows", "width", "classes"), SHAPES)
def test_products_of_the_gradients(rows: int, width: int, classes: int) -> None:
    block = torch.randn(rows, classes).bfloat16()
    hidden, matrix = torch.randn(rows, width).bfloat16(), torch.randn(classes, width).bfloat16()
    result = loss_cpu.hidden_gradient(block, matrix, hidden, torch.float32)
    assert error(result, block.double() @ matrix.double()) < 1e-6
    start = torch.randn(classes, width)
    total = start.clone()
    product = block.double().t() @ hidden.double()
    loss_cpu.weight_gradient_(total, block, hidden, matrix, True)
    assert error(total, start.double() + product) < 1e-6
    total.fill_(torch.nan)
    loss_cpu.weight_gradient_(total, block, hidden, matrix, False)
    assert error(total, product) < 1e-6


@blocks
def test_bfloat16_loss_is_exact_for_its_operands() -> None:
    """Logits never leave float32 accumulators: the loss is that of exact arithmetic on the same operands."""
    case = draw(3, 40, 3, 64, 700, dtype=torch.bfloat16, scale=1.5, slots=6)
    truth, *truth_grads = case.run("reference", torch.float64)
    result, *grads = case.run("torch")
    assert torch.equal(result.prediction, truth.prediction)
    assert float(result.loss.detach()) == pytest.approx(float(truth.loss.detach()), rel=1e-5)
    for one, other in zip(grads, truth_grads):
        assert error(one, other) < 3e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"per_head": True, "chunk_bytes": 9000}, {"temperature": 0.5, "z_loss": 0.01}])
def test_agrees_with_plain_pytorch(dtype: torch.dtype, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    case = draw(2, 30, 2, 32, 333, dtype=dtype, scale=0.5, negatives=0, **options)
    native, *native_grads = case.run("torch")
    monkeypatch.setenv("NTPSEG_DISABLE_NATIVE", "1")
    plain, *plain_grads = case.run("torch")
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert float(native.loss.detach()) == pytest.approx(float(plain.loss.detach()), rel=tolerance)
    for one, other in zip(native_grads, plain_grads):
        assert error(one, other) < tolerance
