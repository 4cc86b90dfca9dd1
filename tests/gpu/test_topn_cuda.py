"""The CUDA ranking and recording on a real device: equality, graphs, no synchronisation, and the timing targets."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from ntpseg import HardTokenMemory
from ntpseg.ops import extension_status, topn_errors
from ntpseg.ops.extension import usable
from ntpseg.ops.topn import plain_topn_errors

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, scope="module")
def _native() -> None:
    if torch.cuda.is_available():
        assert usable("cuda"), extension_status()


def problem(rows: int, length: int, density: float = 0.13) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    deviation = torch.rand(rows, length, device="cuda", generator=generator) * 10
    return deviation, torch.rand(rows, length, device="cuda", generator=generator) < density


def agree(deviation: Tensor, is_error: Tensor, n: int) -> None:
    result, expected = topn_errors(deviation, is_error, n), plain_topn_errors(deviation, is_error, n)
    assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])


@pytest.mark.parametrize("density", [0.0, 0.02, 0.13, 1.0])
@pytest.mark.parametrize(
    ("rows", "length", "n"),
    [
        *[(1, 1, 1), (3, 512, 9), (64, 1568, 64), (64, 4096, 64), (256, 4096, 128), (4096, 4096, 64), (5, 16384, 256)],
        *[(7, 4095, 64), (400, 1001, 256), (65536, 64, 4), (0, 5, 3), (2, 20000, 64), (2, 900, 300)],
    ],
)
def test_equals_the_plain_path(rows: int, length: int, n: int, density: float) -> None:
    deviation, is_error = problem(rows, length, density)
    agree(deviation, is_error, n)
    agree(deviation.round(), is_error, n)


def test_special_values() -> None:
    values = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -1.0, 1e-45], device="cuda")
    deviation = values[torch.randint(0, 7, (16, 3000), device="cuda")]
    agree(deviation, torch.rand(16, 3000, device="cuda") < 0.7, 256)


@pytest.mark.parametrize("length", [512, 1024, 2048, 4096, 16384])
@pytest.mark.parametrize("rows", [3, 400])
def test_thousands_of_ties(rows: int, length: int) -> None:
    deviation = torch.full((rows, length), 1.25, device="cuda")
    agree(deviation, torch.ones_like(deviation, dtype=torch.bool), 256)
    deviation[:, torch.randperm(length, device="cuda")[:70]] = 2.0
    agree(deviation, torch.rand(rows, length, device="cuda") < 0.9, 256)


def test_opcheck() -> None:
    deviation, is_error = problem(3, 40)
    torch.library.opcheck(torch.ops.ntpseg.topn_errors, (deviation, is_error, 7))


def run_epochs(device: str, ids: Tensor, batches: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    memory = HardTokenMemory(8, 32, device)
    for prediction, labels, deviation in batches:
        memory.record(ids.to(device), prediction.to(device), labels.to(device), deviation.to(device))
    return memory.state_dict()["recording"]


@pytest.mark.parametrize("length", [70, 1568, 4096])
def test_recording_with_many_blocks_on_few_samples_equals_the_cpu(length: int) -> None:
    ids = torch.randint(0, 8, (600,))
    batches = []
    for _ in range(3):
        prediction, labels = torch.randint(0, 4, (2, 600, length))
        batches.append((prediction, labels, torch.randint(0, 50, (600, length)).float()))
    ours, theirs = run_epochs("cuda", ids, batches), run_epochs("cpu", ids, batches)
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_captured_record_follows_the_epoch() -> None:
    memory = HardTokenMemory(16, 8, "cuda")
    ids = torch.arange(16, device="cuda")
    prediction, labels = torch.randint(0, 4, (2, 16, 300), device="cuda")
    deviation = torch.rand(16, 300, device="cuda")
    memory.record(ids, prediction, labels, deviation)
    memory.advance()
    expected = memory.lookup(ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        memory.record(ids, prediction, labels, deviation)
        served = memory.lookup(ids)
    for _ in range(3):
        graph.replay()
        assert torch.equal(served.token, expected.token) and torch.equal(served.position, expected.position)
        memory.advance()


def test_nothing_waits() -> None:
    memory = HardTokenMemory(16, 8, "cuda")
    ids = torch.arange(16, device="cuda")
    prediction, labels = torch.randint(0, 4, (2, 16, 300), device="cuda")
    deviation = torch.rand(16, 300, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        memory.record(ids, prediction, labels, deviation)
        memory.lookup(ids)
        topn_errors(deviation, prediction != labels, 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_ids_out_of_range_are_reported_by_advance() -> None:
    memory = HardTokenMemory(4, 8, "cuda")
    prediction = torch.zeros(2, 30, dtype=torch.int64, device="cuda")
    memory.record(torch.tensor([1, 9], device="cuda"), prediction, prediction + 1, prediction.float())
    with pytest.raises(ValueError, match="got 1 ids outside"):
        memory.advance()


@pytest.mark.parametrize("storage", ["pinned", "mapped"])
def test_host_storage_serves_the_device(storage: str, tmp_path) -> None:
    path = tmp_path if storage == "mapped" else None
    memory, expected = HardTokenMemory(16, 8, "cuda", storage=storage, path=path), HardTokenMemory(16, 8, "cuda")
    ids = torch.arange(16)
    for _ in range(30):
        prediction, labels = torch.randint(0, 4, (2, 16, 300), device="cuda")
        deviation = torch.rand(16, 300, device="cuda")
        for each in (memory, expected):
            each.record(ids, prediction, labels, deviation)
    for each in (memory, expected):
        each.advance()
    memory.prefetch(ids)
    result, served = memory.lookup(ids), expected.lookup(ids)
    assert result.token.is_cuda and torch.equal(result.token, served.token)
    assert torch.equal(result.position, served.position)


def microseconds_in_a_graph(call, repeats: int = 50) -> float:
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    times = []
    for _ in range(20):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1000 / repeats)
    return statistics.median(times)


def composition(deviation: Tensor, is_error: Tensor, n: int) -> tuple[Tensor, Tensor]:
    value, index = torch.where(is_error, deviation, -torch.inf).topk(n, dim=1)
    return value, torch.where(value == -torch.inf, -1, index).int()


@pytest.mark.parametrize(
    ("rows", "length", "n", "target"), [(64, 4096, 64, 4.0), (256, 4096, 128, 6.0), (4096, 4096, 64, 50.0)]
)
@pytest.mark.parametrize("density", [0.13, 1.0])
def test_timing_targets(rows: int, length: int, n: int, target: float, density: float) -> None:
    deviation, is_error = problem(rows, length, density)
    ours = microseconds_in_a_graph(lambda: topn_errors(deviation, is_error, n))
    theirs = microseconds_in_a_graph(lambda: composition(deviation, is_error, n))
    print(
        f"{rows} x {length}, n = {n}, {density:.0%} errors: {ours:.2f} us (goal {target:.0f}), "
        f"torch.topk composition {theirs:.2f} us, {theirs / ours:.1f} times as long"
    )
    assert ours <= target
    assert theirs >= 8 * ours


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    script = (
        "import torch, ntpseg\n"
        "m = ntpseg.HardTokenMemory(4, 64, 'cuda')\n"
        "for length in (300, 1001, 4096, 5000):\n"
        "    p, y = torch.randint(0, 4, (2, 6, length), device='cuda')\n"
        "    ids = torch.tensor([0, 1, 1, 2, 0, 3], device='cuda')\n"
        "    d = torch.rand(6, length, device='cuda')\n"
        "    m.record(ids, p, y, d)\n"
        "    ntpseg.ops.topn_errors(d, p != y, 64)\n"
        "torch.cuda.synchronize()\n"
    )
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=ntpseg"]
    result = subprocess.run([*command, sys.executable, "-c", script], capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
