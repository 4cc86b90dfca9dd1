"""The ranking op against the plain Python definition, on every path that this machine has."""

from __future__ import annotations

import math
from collections.abc import Callable

import hard_error_reference as reference
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ntpseg.ops import topn_errors
from ntpseg.ops.topn import plain_topn_errors

# Few distinct values make ties; the rest are the values that a comparison can get wrong.
VALUES = st.sampled_from([0.0, -0.0, 1.0, 1.5, 2.0, -1.0, 1e-45, -1e-45, 3e38, math.inf, -math.inf, math.nan])


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    rows, length = draw(st.integers(0, 3)), draw(st.integers(1, 40))
    size = rows * length
    values = st.one_of(VALUES, st.floats(width=32))
    deviation = draw(st.lists(values, min_size=size, max_size=size))
    is_error = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    return (
        torch.tensor(deviation, dtype=torch.float32).reshape(rows, length),
        torch.tensor(is_error, dtype=torch.bool).reshape(rows, length),
        draw(st.integers(0, 50)),
    )


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run on this instruction set, or the best below it that the processor has."""
    monkeypatch.setenv("NTPSEG_CPU_ISA", request.param)
    return request.param


def on_isa(isa: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def path(deviation: Tensor, is_error: Tensor, n: int) -> tuple[Tensor, Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NTPSEG_CPU_ISA", isa)
            return topn_errors(deviation, is_error, n)

    return path


PATHS = {"plain": plain_topn_errors, **{isa: on_isa(isa) for isa in ("avx512", "avx2", "baseline")}}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@settings(max_examples=150, deadline=None)
@given(problems())
@example((torch.full((2, 33), 1.0), torch.ones(2, 33, dtype=torch.bool), 5))
@example((torch.full((1, 7), -math.inf), torch.tensor([[0, 1, 0, 1, 1, 0, 0]]).bool(), 5))
@example((torch.full((1, 1), math.nan), torch.ones(1, 1, dtype=torch.bool), 2))
def test_equals_the_definition(path, problem: tuple[Tensor, Tensor, int]) -> None:
    value, index = path(*problem)
    expected_value, expected_index = reference.topn_errors(*problem)
    assert value.dtype == torch.float32 and index.dtype == torch.int32
    assert torch.equal(value, expected_value)
    assert torch.equal(index, expected_index)


@pytest.mark.parametrize("density", [0.02, 0.13, 1.0])
@pytest.mark.parametrize(
    ("rows", "length", "n"), [(64, 1568, 64), (3, 5000, 256), (2, 17, 300), (5, 1, 4), (2, 16384, 7)]
)
def test_paths_agree_at_real_sizes(isa: str, rows: int, length: int, n: int, density: float) -> None:
    deviation = torch.randn(rows, length).abs()
    is_error = torch.rand(rows, length) < density
    torch.testing.assert_close(
        topn_errors(deviation, is_error, n), plain_topn_errors(deviation, is_error, n), rtol=0, atol=0
    )
    # Coarse values, as the codebook deviation has them, tie everywhere.
    coarse = (deviation * 2).round()
    torch.testing.assert_close(topn_errors(coarse, is_error, n), plain_topn_errors(coarse, is_error, n), rtol=0, atol=0)


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_sorted_rows(isa: str, order: str) -> None:
    deviation = torch.arange(3000.0).repeat(2, 1)
    expected = torch.arange(2999, 2899, -1)
    if order == "descending":
        deviation, expected = deviation.flip(1), torch.arange(100)
    _, index = topn_errors(deviation, torch.ones_like(deviation, dtype=torch.bool), 100)
    assert torch.equal(index, expected.int().expand(2, -1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_ranked_as_float32(dtype: torch.dtype) -> None:
    deviation = torch.randn(4, 50).to(dtype)
    is_error = torch.rand(4, 50) < 0.5
    value, index = topn_errors(deviation, is_error, 9)
    expected = plain_topn_errors(deviation.float(), is_error, 9)
    assert torch.equal(value, expected[0]) and torch.equal(index, expected[1])


def test_strided_inputs_and_gradients() -> None:
    deviation = torch.randn(30, 4, requires_grad=True).t()
    is_error = (torch.rand(30, 4) < 0.5).t()
    value, index = topn_errors(deviation, is_error, 5)
    expected = plain_topn_errors(deviation.detach().contiguous(), is_error.contiguous(), 5)
    assert torch.equal(value, expected[0]) and torch.equal(index, expected[1])
    assert not value.requires_grad


def test_empty_row_and_empty_column() -> None:
    for shape in [(0, 5), (3, 0), (0, 0)]:
        value, index = topn_errors(torch.zeros(shape), torch.zeros(shape, dtype=torch.bool), 4)
        assert value.shape == index.shape == (shape[0], 4)
        assert (value == -math.inf).all() and (index == -1).all()


def test_inputs_are_left_alone() -> None:
    deviation, is_error = torch.tensor([[math.nan, -0.0, 1.0]]), torch.ones(1, 3, dtype=torch.bool)
    topn_errors(deviation, is_error, 2)
    assert deviation.isnan().tolist() == [[True, False, False]] and math.copysign(1, deviation[0, 1]) == -1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), torch.zeros(3, dtype=torch.bool), 1), "deviation must be"),
        ((torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.bool), 1), "deviation must be"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), 1), "is_error must be"),
        ((torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.bool), 1), "is_error must be"),
        ((torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), -1), "n must be an integer >= 0, got -1"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[Tensor, Tensor, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        topn_errors(*arguments)
