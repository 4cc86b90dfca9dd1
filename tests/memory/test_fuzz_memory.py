"""Random arguments of ranking and memory: right ones agree with the definition, wrong ones end in one line."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable
from typing import Any

import hard_error_reference as reference
import native_extension
import pytest
import torch
from fuzz_settings import fuzz_settings
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ntpseg import HardTokenMemory
from ntpseg.ops import topn_errors

MEMORY_KIB = 400_000
ODD = [math.nan, -1, -(2**70), 2**31, 10**400, 5.0, 2.5, True, False, None, "5", [5], (), {}, 1j, object()]
ANYTHING = st.one_of(
    st.sampled_from(ODD), st.floats(), st.text(max_size=9), st.integers(max_value=-1), st.integers(2**31), st.binary()
)
DEVIATIONS = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 1.0, 2.0, 3.4e38, 1e-45, -1.0]


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def refused(error: BaseException, *names: str) -> None:
    """One line that names one of these arguments."""
    text = str(error)
    assert text.startswith(names), text
    assert "must" in text and "got" in text and "\n" not in text and len(text) < 300


def wrong_tensor(right: Tensor) -> st.SearchStrategy[Any]:
    """What cannot stand for this tensor, of which one size is 2 or more."""
    other = torch.int32 if not right.is_floating_point() else torch.int64
    bad = [None, 3, "x", right.tolist(), right.to(other), right.to(torch.complex64), right[..., None], right.to("meta")]
    return st.sampled_from([*bad, right.to_sparse(), right.new_zeros(()), right.new_zeros(0, 0, 0), right[:-1]])


def strided(tensor: Tensor, layout: int) -> Tensor:
    """The same numbers: as they are, transposed in memory, or every second of a row."""
    if layout == 1:
        return tensor.t().contiguous().t()
    return torch.stack([tensor, tensor], -1).flatten(1)[:, ::2] if layout == 2 else tensor


@st.composite
def ranked(draw: Callable[..., Any]) -> tuple[Tensor, Tensor, int]:
    rows, length, layout = draw(st.integers(0, 3)), draw(st.integers(0, 40)), draw(st.integers(0, 2))
    make = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    numbers = torch.tensor(DEVIATIONS, dtype=torch.float64)
    values = numbers[torch.randint(0, len(numbers), (rows, length), generator=make)]
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    errors = torch.rand(rows, length, generator=make) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    deviation = strided(values.to(dtype), layout).requires_grad_(draw(st.booleans()))
    return deviation, strided(errors, draw(st.integers(0, 2))), draw(st.sampled_from([0, 1, 2, 7, 40, 41, 300]))


@fuzz_settings(200)
@given(case=ranked(), native=st.booleans())
def test_right_rankings_are_those_of_the_definition(case: tuple[Tensor, Tensor, int], native: bool) -> None:
    expected = reference.topn_errors(*case)
    with native_extension.native(native):
        value, index = topn_errors(*case)
    assert torch.equal(value, expected[0]) and torch.equal(index, expected[1]) and not value.requires_grad


@fuzz_settings(200)
@given(data=st.data(), native=st.booleans())
def test_wrong_rankings_are_refused(data: st.DataObject, native: bool) -> None:
    shape = data.draw(st.integers(2, 5)), data.draw(st.integers(2, 40))
    deviation, is_error = torch.zeros(shape), torch.ones(shape, dtype=torch.bool)
    call = {"deviation": deviation, "is_error": is_error, "n": 2}
    name = data.draw(st.sampled_from(sorted(call)))
    call[name] = data.draw(ANYTHING if name == "n" else wrong_tensor(call[name]))
    before = peak()
    with native_extension.native(native), pytest.raises(ValueError) as error:
        topn_errors(**call)
    # a deviation of another shape or device is noticed by the errors that no longer fit it
    refused(error.value, name, *(["is_error"] if name == "deviation" else []))
    assert peak() - before < MEMORY_KIB


@st.composite
def batches(draw: Callable[..., Any]) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Batches of three samples: ids may repeat, predictions be none or as large as they may."""
    make = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    made = []
    for _ in range(draw(st.integers(1, 3))):
        rows, length = draw(st.integers(0, 4)), draw(st.integers(1, 12))
        tokens = torch.tensor([-1, -5, 0, 1, 2, 2**31 - 1])
        prediction = tokens[torch.randint(0, len(tokens), (rows, length), generator=make)]
        labels = torch.tensor([-100, 0, 1, 2, -(2**63)])[torch.randint(0, 5, (rows, length), generator=make)]
        numbers = torch.tensor(DEVIATIONS)
        deviation = numbers[torch.randint(0, len(numbers), (rows, length), generator=make)]
        layout = draw(st.integers(0, 2))
        ids = torch.randint(0, 3, (rows,), generator=make)
        made.append((ids, strided(prediction, layout), strided(labels, layout), strided(deviation, layout)))
    return made


@fuzz_settings(150)
@given(batches=batches(), n=st.integers(1, 6), kind=st.sampled_from(["native", "plain", "pinned"]))
def test_right_batches_are_kept_as_defined(batches: list[tuple[Tensor, ...]], n: int, kind: str) -> None:
    memory = HardTokenMemory(3, n, storage="pinned" if kind == "pinned" else "device")
    visits: dict[int, list[Any]] = {0: [], 1: [], 2: []}
    with native_extension.native(kind != "plain"):
        for ids, prediction, labels, deviation in batches:
            memory.record(ids, prediction, labels, deviation)
            for sample, entries in zip(ids.tolist(), reference.errors_of(prediction, labels, deviation)):
                # a visit brings its n hardest positions
                visits[sample] += sorted(entries, key=lambda e: (-reference.rank_value(e[0]), e[1]))[:n]
        memory.advance()
        found = memory.lookup(torch.arange(3))
    for sample, entries in visits.items():
        expected = [(p, t) for _, p, t in reference.best(entries, n)]
        expected += [(-1, -1)] * (n - len(expected))
        assert list(zip(found.position[sample].tolist(), found.token[sample].tolist())) == expected


@fuzz_settings(200)
@given(data=st.data(), native=st.booleans())
def test_wrong_batches_are_refused_and_change_nothing(data: st.DataObject, native: bool) -> None:
    memory, length = HardTokenMemory(4, 2), data.draw(st.integers(2, 60))
    labels = torch.ones(2, length, dtype=torch.int64)
    call = {
        "sample_ids": torch.tensor([0, 3]),
        "prediction": labels * 2,
        "labels": labels,
        "deviation": torch.rand(2, length),
    }
    name = data.draw(st.sampled_from(sorted(call)))
    beyond = st.integers(2**31, 2**63 - 1)
    outside = {"sample_ids": st.one_of(st.integers(-(2**63), -1), st.integers(4, 9), beyond), "prediction": beyond}
    if name in outside and data.draw(st.booleans()):
        call[name] = call[name].clone()
        flat = call[name].view(-1)
        flat[data.draw(st.integers(0, len(flat) - 1))] = data.draw(outside[name])
    else:
        bad = wrong_tensor(call[name])
        call[name] = data.draw(bad if name == "sample_ids" else st.one_of(bad, st.just(call[name][:, :0])))
    before = memory.state_dict()
    with native_extension.native(native), pytest.raises(ValueError) as error:
        memory.record(**call)
    refused(error.value, name, "prediction", *(["labels", "deviation"] if name == "prediction" else []))
    after = memory.state_dict()
    assert all(torch.equal(before["recording"][key], after["recording"][key]) for key in before["recording"])


def _may_be(name: str, value: Any) -> bool:
    """Whether this is right after all, or asks for so many samples that there is no memory for them."""
    if type(value) is int:
        return (name == "ignore_index" and -(2**63) <= value < 2**63) or (name == "num_samples" and 0 < value < 2**63)
    return value is None and name in ("device", "path")


@fuzz_settings(100)
@given(data=st.data())
def test_wrong_memories_are_refused(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["num_samples", "n", "device", "storage", "path", "deviation", "ignore_index"]))
    bad = data.draw(ANYTHING.filter(lambda value: not _may_be(name, value)))
    with pytest.raises(ValueError) as error:
        HardTokenMemory(**{"num_samples": 3, "n": 2, name: bad})
    refused(error.value, name)


@fuzz_settings(60)
@given(data=st.data())
def test_wrong_ids_are_refused(data: st.DataObject) -> None:
    memory = HardTokenMemory(4, 2)
    right = torch.tensor([0, 3])
    spoilt = st.sampled_from([torch.tensor([0, 4]), torch.tensor([-1]), torch.tensor([2**62])])
    bad = data.draw(st.one_of(spoilt, wrong_tensor(right).filter(lambda x: not isinstance(x, Tensor) or x.dim() != 1)))
    for function in (memory.lookup, memory.prefetch):
        with pytest.raises(ValueError) as error:
            function(bad)
        refused(error.value, "sample_ids")
