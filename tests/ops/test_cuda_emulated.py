"""The CUDA kernels' logic without a GPU: csrc/cuda compiled for the CPU, every CUDA thread a fiber."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ntpseg.ops.record import plain_record_errors
from ntpseg.ops.topn import plain_topn_errors

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).with_name("cuda_emulator")
POINTER = ctypes.c_void_p


class TopnArguments(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("deviation", "is_error", "value", "index")),
        ("rows", ctypes.c_int64),
        ("length", ctypes.c_int),
        ("n", ctypes.c_int),
    ]


class RecordArguments(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("deviation", "prediction", "labels", "sample_ids", "epoch")),
        *((name, POINTER) for name in ("memory", "stamp", "control")),
        *((name, ctypes.c_int64) for name in ("rows", "samples", "ignore_index")),
        *((name, ctypes.c_int) for name in ("length", "n", "locks")),
    ]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("emulator") / "kernels.so"
    includes = [f"-I{EMULATOR}", f"-I{ROOT / 'csrc' / 'cuda'}"]
    command = [
        "g++",
        "-O1",
        "-std=c++20",
        "-shared",
        "-fPIC",
        *includes,
        str(EMULATOR / "entry.cpp"),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def topn(emulator: ctypes.CDLL, deviation: Tensor, is_error: Tensor, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rows, length = deviation.shape
    value, index = torch.full((rows, n), 7.0), torch.full((rows, n), 7, dtype=torch.int32)
    arguments = TopnArguments(*(x.data_ptr() for x in (deviation, is_error, value, index)), rows, length, n)
    assert emulator.emulate_topn(ctypes.byref(arguments), seed) == 0
    return value, index


def agree(emulator: ctypes.CDLL, deviation: Tensor, is_error: Tensor, n: int, seed: int = 0) -> None:
    result, expected = topn(emulator, deviation, is_error, n, seed), plain_topn_errors(deviation, is_error, n)
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1], expected[1])


# Lengths for each of the launcher's block shapes for few rows, with and without vector loads.
SHAPES = [(3, 1), (3, 512), (2, 509), (2, 1024), (2, 1001), (2, 2048), (2, 1567), (2, 4096), (1, 4095)]
SHAPES += [(1, 16384), (1, 8191)]


@pytest.mark.parametrize(("rows", "length"), SHAPES)
@pytest.mark.parametrize("density", [0.05, 1.0])
def test_topn_at_every_block_shape(emulator: ctypes.CDLL, rows: int, length: int, density: float) -> None:
    deviation = torch.randn(rows, length)
    is_error = torch.rand(rows, length) < density
    n = min(64, 1 + length // 2)
    agree(emulator, deviation, is_error, n)


@pytest.mark.parametrize("length", [2100, 2101])
def test_topn_of_many_rows(emulator: ctypes.CDLL, length: int) -> None:
    deviation = torch.randn(321, length)
    deviation[::2] = deviation[::2].round()
    deviation[::5] = 2.5
    agree(emulator, deviation, torch.rand(321, length) < torch.rand(321, 1), 64)


def bits(*patterns: int) -> Tensor:
    return torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)


NOT_NUMBERS = bits(0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7F800000)  # quiet, signalling, either sign, +inf


@pytest.mark.parametrize("length", [512, 1024, 2048, 4095, 4096, 16384])
@pytest.mark.parametrize("kind", ["all", "most", "between", "zeros", "least", "not numbers", "neighbours"])
def test_topn_of_thousands_of_ties(emulator: ctypes.CDLL, kind: str, length: int) -> None:
    deviation = torch.full((1, length), 1.25)
    some = torch.randperm(length)[:70]
    if kind == "most":
        deviation[0, some] = 2.0 + torch.rand(70)
    elif kind == "between":
        deviation[0, some] = torch.arange(70.0) - 40.0
    elif kind == "zeros":
        deviation = torch.tensor([0.0, -0.0])[torch.randint(0, 2, (1, length))]
    elif kind == "least":
        deviation.fill_(-torch.inf)
        deviation[0, some[:3]] = torch.finfo(torch.float32).min
    elif kind == "not numbers":
        deviation = NOT_NUMBERS[torch.randint(0, 5, (1, length))]
    elif kind == "neighbours":  # the last digit tells two values apart, each with more ties than there is room for
        deviation = bits(0x41200000, 0x411FFFFF)[torch.randint(0, 2, (1, length))]
    for n, density in [(256, 1.0), (1, 1.0), (100, 0.8)]:
        is_error = torch.rand(1, length) < density
        agree(emulator, deviation, is_error, n, seed=n)


@pytest.mark.parametrize("length", [512, 4096])
@pytest.mark.parametrize("scale", ["one infinite", "one huge", "octaves", "signs", "subnormal", "any"])
def test_topn_over_the_range_of_floats(emulator: ctypes.CDLL, scale: str, length: int) -> None:
    deviation = torch.rand(2, length)
    if scale == "one infinite":
        deviation[:, 7] = torch.inf
    elif scale == "one huge":
        deviation[:, 7] = 3e38
    elif scale == "octaves":
        deviation = torch.exp2(torch.empty(2, length).uniform_(-149, 128))
    elif scale == "signs":
        deviation = torch.exp2(torch.empty(2, length).uniform_(-40, 40)) * torch.randint(-1, 1, (2, length)).sign()
    elif scale == "subnormal":
        deviation = torch.randint(-3000, 100, (2, length)).float() * 2.0**-149
    elif scale == "any":
        deviation = torch.randint(-(2**31), 2**31, (2, length)).to(torch.int32).view(torch.float32)
    for n in (3, 200):
        agree(emulator, deviation, torch.rand(2, length) < 0.9, n)


@pytest.mark.parametrize("errors", [1, 2, 63, 64, 65, 128, 129])
@pytest.mark.parametrize("length", [1024, 4096])
def test_topn_where_errors_are_few(emulator: ctypes.CDLL, errors: int, length: int) -> None:
    is_error = torch.zeros(1, length, dtype=torch.bool)
    is_error[0, torch.randperm(length)[:errors]] = True
    for deviation in (torch.rand(1, length), torch.randn(1, length) * 1e-3, torch.full((1, length), -torch.inf)):
        agree(emulator, deviation, is_error, 64)


@pytest.mark.parametrize("n", [1, 5, 64, 256])
@pytest.mark.parametrize("kind", ["equal", "two values", "few values", "one bin", "special", "ascending", "close"])
def test_topn_where_values_crowd(emulator: ctypes.CDLL, kind: str, n: int) -> None:
    length = 2000
    deviation = {
        "equal": torch.full((2, length), 1.25),
        "two values": torch.randint(0, 2, (2, length)).float(),
        "few values": torch.randint(0, 5, (2, length)).float(),
        "one bin": 1.0 + torch.rand(2, length) * 0.1,
        "special": torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -1.0, 1e-45])[
            torch.randint(0, 7, (2, length))
        ],
        "ascending": torch.arange(float(length)).repeat(2, 1),
        # Apart in the last bits alone, so that every digit has to be looked at, and some are equal to the last.
        "close": (0x3F800000 + torch.randint(0, 900, (2, length))).int().view(torch.float32),
    }[kind]
    agree(emulator, deviation, torch.rand(2, length) < 0.9, n)


def test_topn_does_not_depend_on_the_order_of_threads(emulator: ctypes.CDLL) -> None:
    deviation, is_error = torch.randint(0, 40, (1, 3000)).float(), torch.rand(1, 3000) < 0.5
    for seed in range(5):
        agree(emulator, deviation, is_error, 50, seed)
        agree(emulator, deviation.clamp(max=7), is_error, 50, seed)


def test_nothing_to_do(emulator: ctypes.CDLL) -> None:
    agree(emulator, torch.rand(2, 600), torch.zeros(2, 600, dtype=torch.bool), 9)
    agree(emulator, torch.zeros(0, 600), torch.zeros(0, 600, dtype=torch.bool), 9)
    agree(emulator, torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool), 9)


def test_sizes_beyond_the_kernels_are_refused(emulator: ctypes.CDLL) -> None:
    for length, n in [(16385, 4), (100, 257)]:
        arguments = TopnArguments(None, None, None, None, 1, length, n)
        assert emulator.emulate_topn(ctypes.byref(arguments), 0) != 0


@pytest.mark.parametrize(("length", "n"), [(50, 3), (256, 256), (700, 256), (2048, 64), (3000, 256), (5000, 100)])
def test_record(emulator: ctypes.CDLL, length: int, n: int) -> None:
    samples, size = 5, 6
    ours, theirs = (
        (
            torch.zeros(2, samples, 3, n, dtype=torch.int32),
            torch.zeros(2, samples, dtype=torch.int32),
            torch.zeros(4, dtype=torch.int32),
            torch.ones((), dtype=torch.int64),
        )
        for _ in range(2)
    )
    for step in range(6):
        ids = torch.randint(0, samples, (size,))
        ids[0] = -1 if step % 2 else samples
        # A batch of shorter rows meets entries at positions that it does not have.
        width = length if step % 3 else length // 2 + 1
        prediction, labels = torch.randint(0, 4, (2, size, width))
        prediction[:, ::7], labels[:, ::5] = -1, -100
        deviation = torch.randint(0, 30, (size, width)).float()
        deviation[:, ::11] = torch.nan
        tensors = (deviation, prediction, labels, ids, ours[3], *ours[:3])
        pointers = [tensor.data_ptr() for tensor in tensors]
        arguments = RecordArguments(*pointers, size, samples, -100, width, n, 3)
        assert emulator.emulate_record(ctypes.byref(arguments), step) == 0
        plain_record_errors(*theirs, ids, prediction, labels, deviation, -100)
        for mine, expected in zip(ours, theirs):
            assert torch.equal(mine, expected), step
        if step % 2:
            ours[3].add_(1)
            theirs[3].add_(1)
    assert ours[2].tolist() == [6, 0, 0, 0]
