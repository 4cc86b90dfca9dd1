"""Scaling curves: the model of time by hand, the curves' ends, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ntpseg.cli import app
from ntpseg.cluster.communication import Collective
from ntpseg.cluster.communication.seconds import call_seconds, step_seconds
from ntpseg.cluster.machines import GPUS, gpu
from ntpseg.cluster.planning.memory import Batch
from ntpseg.cluster.planning.numerics import Numerics
from ntpseg.cluster.planning.search import PlanOptions, evaluate
from ntpseg.cluster.scaling import ScalingOptions, gpu_numbers, scaling_curves
from ntpseg.cluster.workload import Workload
from ntpseg.training.config import load_config


@pytest.fixture(scope="module")
def tiny() -> Workload:
    return Workload.of(load_config("tiny"))


def test_time_of_a_call_by_hand() -> None:
    """1 GB on H100s: links alone within a node; over two, eight adapters of 50 GB/s are slower than a link of 450."""
    h100, size = gpu("h100"), 1e9
    assert call_seconds("all_reduce", size, 1, h100) == 0.0
    inside = 8.4e-6 + 14 * 3.4e-6 + 2 * 7 / 8 * size / (450e9 * 0.8)
    assert call_seconds("all_reduce", size, 8, h100) == pytest.approx(inside)
    across = 8.4e-6 + 14 * 3.4e-6 + 14e-6 + 15 / 16 * size / (400e9 * 0.8)
    assert call_seconds("all_gather", size, 16, h100) == pytest.approx(across)
    # a small one between 128 nodes goes up and down a tree of seven levels by the quick protocol
    tree = 6.6e-6 + 2 * (7 * 0.6e-6 + 7 * 5e-6) + 2 * 8 / (400e9 * 0.8 * 0.5)
    assert call_seconds("all_reduce", 8, 1024, h100) == pytest.approx(tree)


def test_time_grows_with_bytes_and_ranks() -> None:
    for hardware in GPUS.values():
        for kind in ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all"):
            by_ranks = [call_seconds(kind, 1e8, n, hardware) for n in (1, 2, 8, 16, 128, 1024)]  # type: ignore[arg-type]
            assert by_ranks == sorted(by_ranks) and by_ranks[1] > 0
            assert call_seconds(kind, 2e8, 16, hardware) > by_ranks[3]  # type: ignore[arg-type]


def test_time_of_a_step_by_hand() -> None:
    """Hidden: beside each computation at most nine tenths, and no longer than it takes; between them nothing."""
    h100, size = gpu("h100"), 1 << 30
    one = call_seconds("all_gather", size, 8, h100)
    gather = Collective("all_gather", size, 4, "forward", "weights", micro_steps=2)
    scatter = Collective("reduce_scatter", size, 2, "backward", "gradients", micro_steps=2)
    after = Collective("all_gather", size, 1, "step", "updated weights")
    traffic = [gather, scatter, after]
    long = step_seconds(traffic, 8, h100, 1e3)
    assert long.total == pytest.approx(7 * one) and long.exposed == pytest.approx(0.1 * 6 * one + one)
    # Two micro-batches, of which forward is a third, or with checkpointing a quarter.
    short = step_seconds(traffic, 8, h100, one)
    assert short.exposed == pytest.approx(7 * one - 2 * one / 3 - 2 * one * 2 / 3)
    again = step_seconds([gather], 8, h100, one, checkpointing=True)
    assert again.exposed == pytest.approx(4 * one - 2 * one / 4)
    assert step_seconds(traffic, 8, h100, 1e3, overlap=0.0).exposed == pytest.approx(7 * one)
    assert step_seconds([], 1, h100, 1.0) == (0.0, 0.0)


def test_plans_have_the_communication_of_the_curves(tiny: Workload) -> None:
    h100 = gpu("h100")
    for strategy in ("zero1", "zero3", "fsdp2"):
        batch = Batch(tiny.micro_batch, tiny.accumulation)
        planned = evaluate(tiny, h100, PlanOptions(gpus=16), Numerics(strategy), batch)
        seconds = planned.compute.model / tiny.accumulation
        options = ScalingOptions(strategy=strategy, max_gpus=16, micro_batch_seconds=seconds)  # type: ignore[arg-type]
        point = scaling_curves(tiny, options).weak[-1]
        assert planned.collectives.total == pytest.approx(point.communication_seconds)
        assert planned.collectives.exposed == pytest.approx(point.exposed_seconds)


def test_curves(tiny: Workload) -> None:
    curves = scaling_curves(tiny, ScalingOptions(strategy="ddp", max_gpus=48, global_batch=32))
    assert [point.gpus for point in curves.weak] == [1, 2, 4, 8, 16, 32, 48] == gpu_numbers(48)
    assert [point.gpus for point in curves.strong] == [1, 2, 4, 8, 16, 32]  # 48 would have no sequence
    assert [point.micro_batch * point.accumulation for point in curves.strong] == [32, 16, 8, 4, 2, 1]
    for points in (curves.weak, curves.strong):
        assert points[0].efficiency == pytest.approx(1.0) and points[0].wire_bytes == 0
        efficiency = [point.efficiency for point in points]
        assert efficiency == sorted(efficiency, reverse=True) and efficiency[-1] < 1
        for point in points:
            assert point.step_seconds == pytest.approx(point.compute_seconds + point.exposed_seconds)
            assert 0 <= point.exposed_seconds <= point.communication_seconds
    weak = curves.weak[-1]
    assert weak.tokens_per_second == pytest.approx(48 * 16 * tiny.mean_tokens / weak.step_seconds)


def test_assumptions_do_what_they_say(tiny: Workload) -> None:
    def last(**options: object) -> float:
        return scaling_curves(tiny, ScalingOptions(max_gpus=8, **options)).weak[-1].step_seconds  # type: ignore[arg-type]

    point = scaling_curves(tiny, ScalingOptions(max_gpus=8, overlap=0.0)).weak[-1]
    assert point.exposed_seconds == pytest.approx(point.communication_seconds)
    assert last(overlap=0.0) > last(overlap=0.9)
    assert last(mfu=0.2) > last(mfu=0.4)
    assert last(samples=100_000) > last()
    given = scaling_curves(tiny, ScalingOptions(max_gpus=1, micro_batch_seconds=2.0)).weak[0]
    assert given.step_seconds == pytest.approx(2.0)
    # stage 1 reduces after backward, stage 2 beside it
    assert last(strategy="zero1", micro_batch_seconds=1.0) > last(strategy="zero2", micro_batch_seconds=1.0)


def test_indivisible_batches_cost_efficiency(tiny: Workload) -> None:
    """Nine sequences on eight GPUs take as long as sixteen."""
    options = ScalingOptions(strategy="ddp", max_gpus=8, global_batch=9, micro_batch_seconds=16.0)
    point = scaling_curves(tiny, options).strong[-1]
    assert point.compute_seconds == pytest.approx(2.0)
    assert point.efficiency == pytest.approx(9 / 16, rel=1e-2)


def test_command(tmp_path: Path) -> None:
    arguments = ["scaling", "model.k=2", "--preset", "tiny", "--zero", "0", "--fsdp2", "--gpus", "16"]
    for name in ("curves.json", "curves.svg"):
        arguments += ["--out", str(tmp_path / name)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "all predicted" in " ".join(done.output.split()) and "fsdp2, strong scaling" in done.output
    found = json.loads((tmp_path / "curves.json").read_text())
    assert [each["options"]["strategy"] for each in found["curves"]] == ["ddp", "fsdp2"]
    assert all(each["predicted"] for each in found["curves"])
    assert found["curves"][0]["weak"][-1]["gpus"] == 16
    assert "<svg" in (tmp_path / "curves.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "h1000"], "gpu must be one of a100"),
        (["--preset", "huge"], "huge"),
        (["--out", "curves.txt"], "--out must end in .json"),
        (["--out", "a.json", "--out", "a.json"], "a.json twice"),
        (["--micro-batch-seconds", "0"], "micro_batch_seconds must be"),
    ],
)
def test_command_refuses(arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["scaling", "--preset", "tiny", *arguments])
    assert isinstance(done.exception, ValueError) and words in str(done.exception)
    assert list(tmp_path.iterdir()) == []
