"""``make gpu-check``: its stages, its limits, what it keeps of a step that ends badly, and the kit that travels."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check.runner import _GRACE, OWN_LIMIT, archive, own_limit, run_step, time_limit
from benchmarks.gpu_check.stages import SECONDS, STAGES, stage_steps
from benchmarks.gpu_check.triton_cache import relocate
from benchmarks.gpu_check.wheels import unpack
from benchmarks.harness.environment import ROOT
from benchmarks.tune import CANDIDATES, name_of

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@no_gpu
def test_without_a_gpu_it_fails_and_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 1
    assert "nothing was checked" in capfd.readouterr().err


def test_it_wants_a_folder_of_wheels(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--wheels", str(tmp_path / "none")]) == 2
    assert "must be a folder" in capfd.readouterr().err


def test_it_names_the_steps_that_there_are(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--stage", "1", "--anywhere", "--kit", str(tmp_path), "--out", str(tmp_path), "--steps", "lost"]
    assert gpu_check.main(arguments) == 2
    assert "got lost" in capfd.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_fits_its_slot_and_names_only_what_exists(stage: str) -> None:
    steps = stage_steps(stage, native=True)
    assert len({step.name for step in steps}) == len(steps)
    assert sum(step.seconds for step in steps) <= SECONDS[stage] + 30  # shares: what is fast leaves its time
    assert SECONDS[stage] <= 240
    for step in steps:
        for part in step.command:
            if part.startswith("tests/"):
                assert (ROOT / part.split("::")[0]).exists(), part
        if "-m" in step.command and step.command[step.command.index("-m") + 1].startswith("benchmarks."):
            module = step.command[step.command.index("-m") + 1].replace(".", "/")
            assert (ROOT / f"{module}.py").exists(), module


def test_the_candidates_of_the_stages_are_ones_of_tune() -> None:
    known = {name_of(config) for config in CANDIDATES["sm_90"]}
    seen = set()
    for stage in STAGES:
        for step in stage_steps(stage, native=True):
            if "--only" in step.command and "benchmarks.tune" in step.command:
                seen |= set(step.command[step.command.index("--only") + 1 :])
    assert len(seen) == 6 and seen <= known


def test_the_first_stage_asks_first_whether_it_is_right() -> None:
    names = [step.name for step in stage_steps("1", native=True)]
    assert names.index("tests") < names.index("loss") < names.index("timeline")
    assert stage_steps("1", native=False)[0].name == "build"
    everything = [step.name for step in stage_steps("all", native=True)]
    assert set(names) <= set(everything) and len(everything) > len(names)


def test_the_pingpong_product_runs_in_a_step_of_its_own() -> None:
    file = "tests/gpu/test_pingpong_cuda.py"
    steps = [step for stage in STAGES for step in stage_steps(stage, native=True)]
    (tests,) = (step for step in steps if "tests/gpu" in step.command and "gpu and not slow" in step.command)
    assert tests.command[tests.command.index("--ignore") + 1] == file
    (step,) = (step for step in stage_steps("2", native=True) if step.name == "pingpong")
    (limit,) = re.findall(r"pytest\.mark\.timeout\((\d+)", (ROOT / file).read_text())
    assert file in step.command and 2 * int(limit) <= step.seconds


def test_every_test_that_needs_a_gpu_is_run_by_a_stage() -> None:
    commands = [step.command for stage in STAGES for step in stage_steps(stage, native=True)]
    options = ("--ignore", "--deselect")
    run = {
        part
        for command in commands
        for before, part in itertools.pairwise(command)
        if part.startswith("tests/") and before not in options
    }
    needing = set()
    for path in (ROOT / "tests").rglob("*.py"):
        text = path.read_text()
        marked = "pytest.mark.gpu" in text
        if re.search(r"skipif\(\s*not torch\.cuda\.is_available", text):
            assert marked, f"{path.name}: what needs a GPU must be marked gpu"  # the steps choose by the mark
        if marked and path != Path(__file__).resolve():
            needing.add(path.relative_to(ROOT).as_posix())
    assert len(needing) >= 6
    for name in needing:
        assert any(name == part or name.startswith(f"{part}/") for part in run), f"no stage runs {name}"


def _captured_steps(tree: ast.AST) -> list[ast.FunctionDef]:
    """Functions with a backward pass, by the names that are called under ``with torch.cuda.graph(...)``."""
    captures = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.With) and "torch.cuda.graph(" in ast.unparse(node.items[0])
    ]
    called = {ast.unparse(node.func) for each in captures for node in ast.walk(each) if isinstance(node, ast.Call)}
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in called]
    return [function for function in functions if ".backward()" in ast.unparse(function)]


def test_no_captured_step_returns_a_loss_with_its_graph() -> None:
    """Kept until the capture, it holds nodes of the leaves that were made on another stream: the capture fails."""
    files = [*(ROOT / "tests" / "gpu").glob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    steps = [step for path in files for step in _captured_steps(ast.parse(path.read_text()))]
    assert len(steps) >= 4
    for step in steps:
        for node in ast.walk(step):
            if isinstance(node, ast.Return) and node.value is not None:
                text = ast.unparse(node.value)
                assert not re.search(r"\bloss\b(?!\.detach\(\)|['\"])", text), f"{step.name} returns {text}"


def test_steps_share_the_time() -> None:
    seconds, left = [15.0, 75.0, 50.0], 140.0
    for index in range(len(seconds)):  # every step takes all that it may
        share = time_limit(seconds[index:], left)
        assert share == pytest.approx(seconds[index])
        left -= share
    assert time_limit(seconds[1:], 139.0) > 75.0  # the first was fast


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_with_a_limit_of_its_own_ends_before_it_is_interrupted(stage: str) -> None:
    steps = stage_steps(stage, native=True)
    limited = [index for index, step in enumerate(steps) if "--time-limit" in step.command]
    assert len(limited) == {"1": 1, "2": 2, "3": 0}[stage]
    shares = [step.seconds for step in steps]
    for index in limited:
        command = steps[index].command
        assert command[command.index("--time-limit") + 1] == OWN_LIMIT
        # every step before it takes all that it may
        limit = time_limit(shares[index:], SECONDS[stage] * sum(shares[index:]) / sum(shares))
        # a limit starts when PyTorch and Triton are imported
        assert limit - _GRACE >= own_limit(limit) + 15 and own_limit(limit) >= 20


def test_a_step_is_told_its_own_limit(tmp_path: Path) -> None:
    told = run_step("told", [sys.executable, "-c", "import sys; print(sys.argv[1])", OWN_LIMIT], 60.0, {}, tmp_path)
    assert told["tail"] == ["37"] and own_limit(10.0) == 1


def test_the_sanitizer_has_a_minute_and_one_tool() -> None:
    steps = stage_steps("3", native=True)
    assert steps[-1].name == "sanitizer" and "memcheck" in " ".join(steps[-1].command)
    shares = [step.seconds for step in steps]
    assert time_limit(shares[-1:], SECONDS["3"] * shares[-1] / sum(shares)) - _GRACE >= 60


def test_a_step_is_stopped_at_its_limit_and_may_still_speak(tmp_path: Path) -> None:
    test = tmp_path / "test_slow.py"
    test.write_text(
        "import time\n\ndef test_wrong():\n    assert 1 == 2, 'the reason'\n\ndef test_slow():\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", str(test)]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as where a shell started all this in the background
    try:
        result = run_step("slow", command, 25.0, dict(os.environ), tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result["result"] == "out of time" and result["seconds"] < 45
    assert "the reason" in (tmp_path / "slow.log").read_text()
    deaf = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('hello', flush=True); time.sleep(60)"
    )
    result = run_step("deaf", [sys.executable, "-c", deaf], 12.0, dict(os.environ), tmp_path)
    assert result["result"] == "out of time" and result["seconds"] < 30 and result["tail"] == ["hello"]
    command = [sys.executable, "-c", "raise SystemExit(4)"]
    assert run_step("bad", command, 60.0, dict(os.environ), tmp_path)["result"] == "failed (4)"
    assert run_step("late", command, 1.0, dict(os.environ), tmp_path)["result"] == "out of time"


def test_results_and_logs_come_back_in_one_archive(tmp_path: Path) -> None:
    work = tmp_path / "stage"
    for part in ("results", "logs"):
        (work / part).mkdir(parents=True)
        (work / part / "file").write_text(part)
    archive(work, tmp_path / "stage.tar.gz")
    with tarfile.open(tmp_path / "stage.tar.gz") as file:
        assert file.getnames() == ["results", "results/file", "logs", "logs/file"]
    assert [path.name for path in tmp_path.glob("*.tar.gz*")] == ["stage.tar.gz"]


def test_the_table_shows_the_end_of_what_failed() -> None:
    good = {"step": "loss", "seconds": 3.0, "result": "passed", "tail": ["unseen"]}
    bad = {"step": "tests", "seconds": 2.5, "result": "failed (1)", "tail": ["FAILED tests/gpu/test_x.py"]}
    text = gpu_check.table([good, bad], 5.5)
    assert "FAILED tests/gpu" in text and "unseen" not in text and "loss" in text


def test_the_steps_find_what_the_kit_brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRITON_CACHE_DIR", "NTPSEG_COMMIT"):
        monkeypatch.delenv(name, raising=False)
    empty = gpu_check.step_environment(tmp_path / "none", None, tmp_path)
    assert "TRITON_CACHE_DIR" not in empty and "NTPSEG_COMMIT" not in empty
    kit = tmp_path / "kit"
    for folder in ("triton-cache", "site-packages"):
        (kit / folder).mkdir(parents=True)
    (kit / "kit.json").write_text(json.dumps({"commit": "abc1234"}))
    environment = gpu_check.step_environment(kit, None, tmp_path)
    assert environment["TRITON_CACHE_DIR"] == str(kit / "triton-cache") and environment["NTPSEG_COMMIT"] == "abc1234"
    assert environment["PYTHONPATH"].split(os.pathsep)[:2] == [str(ROOT), str(kit / "site-packages")]


def test_the_operators_are_those_of_the_kit(tmp_path: Path) -> None:
    kit, package = tmp_path / "kit", tmp_path / "package"
    (kit / "ntpseg").mkdir(parents=True)
    package.mkdir()
    (package / "_C_cuda.cpython-27-x86_64-linux-gnu.so").write_text("another Python's")
    assert not gpu_check.install_native(tmp_path / "none", package)
    for name in ("_C.abi3.so", "_C_cuda.abi3.so"):
        (kit / "ntpseg" / name).write_text("new")
        (package / name).write_text("of an earlier commit")
    assert gpu_check.install_native(tmp_path / "none", package)
    loaded = (package / "_C.abi3.so").open()
    assert gpu_check.install_native(kit, package)
    assert [(package / name).read_text() for name in ("_C.abi3.so", "_C_cuda.abi3.so")] == ["new", "new"]
    assert loaded.read() == "of an earlier commit"
    loaded.close()
    assert not list(package.glob("*.part"))


def test_kernels_are_found_in_a_cache_that_was_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.cache import FileCacheManager

    built, moved, key = tmp_path / "built", tmp_path / "moved", "ab" * 32
    monkeypatch.setenv("TRITON_CACHE_DIR", str(built))
    cache = FileCacheManager(key)
    names = ("kernel.cubin", "kernel.json")
    written = {name: cache.put("{}", name, binary=False) for name in (*names, "kernel.ttir")}
    cache.put_group("kernel.json", written)
    Path(written["kernel.ttir"]).unlink()  # the kit leaves out what a device does not need
    built.rename(moved)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(moved))
    assert relocate(moved) == 1 and relocate(tmp_path / "none") == 0
    found = FileCacheManager(key).get_group("kernel.json")
    assert found is not None and set(found) == set(names)
    assert all(Path(path).is_relative_to(moved) and Path(path).is_file() for path in found.values())


@no_gpu
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_kit_holds_what_a_device_asks_for(tmp_path: Path) -> None:
    """Compiled under a driver that is not there; asked for again under the same one, nothing is compiled anew."""
    pytest.importorskip("triton")
    code = (
        "import os, sys, tempfile, pathlib, triton\n"
        "from benchmarks.gpu_check import warm\n"
        "folder = pathlib.Path(tempfile.mkdtemp())\n"
        "warm.stub_libcuda(folder)\n"
        "triton.runtime.driver.set_active(warm.PretendedDriver(90))\n"
        "import triton.compiler.compiler as compiler\n"
        "made = []\n"
        "original = compiler.ASTSource.make_ir\n"
        "compiler.ASTSource.make_ir = lambda self, *a, **k: (made.append(self.name), original(self, *a, **k))[1]\n"
        "from ntpseg.kernels.gemm_configs import GEMM_CONFIGS\n"
        "with warm.Counter() as counter:\n"
        "    warm.launch_candidate(GEMM_CONFIGS['sm_90'].forward)\n"
        "print(len(counter.kernels), len(made), counter.failed)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    printed = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stderr[-3000:]
        printed.append(done.stdout.strip().splitlines()[-1])
    assert printed == ["3 3 []", "3 0 []"]  # all rows, those of a list, and the first so many


def _wheel(folder: Path, name: str, tag: str = "py3-none-any", **files: str) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-{tag}.whl", "w") as file:
        for path, text in files.items():
            file.writestr(path.replace("__", "/").replace("_dot_", "."), text)
        file.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{name}-1.0.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        file.writestr(f"{name}-1.0.dist-info/RECORD", "")


def test_wheels_are_unpacked_beside_the_environment(tmp_path: Path) -> None:
    wheels, peers = tmp_path / "wheels", tmp_path / "peers"
    for name in ("peer", "torch", "sympy"):  # the last is a requirement of PyTorch's
        _wheel(wheels, name, **{f"{name}_module_dot_py": "value = 7\n"})
    _wheel(wheels, "paths", paths_dot_pth="inner\n", inner__inner_module_dot_py="")
    # nvidia-cutlass-dsl adds its folder by a line of code, which PYTHONPATH alone would never run
    code = "import sys, os, outer; sys.path.insert(0, os.path.join(outer.__path__[0], 'packages'))\n"
    _wheel(wheels, "code", code_dot_pth=code, outer__packages__cute_module_dot_py="")
    paths = unpack(wheels, peers)
    peers /= "site-packages"
    assert set(paths) == {str(peers), str(peers / "inner"), str(peers / "outer" / "packages")}
    assert paths[0] == str(peers)
    assert (peers / "peer_module.py").exists()
    assert not (peers / "torch_module.py").exists() and not (peers / "sympy_module.py").exists()


def test_a_wheel_for_another_machine_is_left_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wheels, peers = tmp_path / "wheels", tmp_path / "peers"
    _wheel(wheels, "peer", peer_module_dot_py="")
    _wheel(wheels, "other", "cp27-cp27m-win32", other_module_dot_py="")
    assert unpack(wheels, peers) == [str(peers / "site-packages")]
    peers /= "site-packages"
    assert (peers / "peer_module.py").exists() and not (peers / "other_module.py").exists()
    assert "left out" in capfd.readouterr().err


def test_no_wheels_is_no_path(tmp_path: Path) -> None:
    assert unpack(tmp_path, tmp_path / "peers") == []


@no_gpu
def test_a_stage_is_rehearsed_on_a_device_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_check.pretend",
        "benchmarks",
        "topn",
        "--quick",
        "--device",
        "cuda",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += ["--seconds", "0.1", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = tmp_path.glob("topn*pretended-device*.json")
    rows = json.loads(path.read_text())
    assert {row["kind"] for row in rows} == {"cuda"} and any(row["status"] == "ok" for row in rows)
