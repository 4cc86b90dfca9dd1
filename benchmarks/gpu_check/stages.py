"""Which steps each stage has, in the order of their worth, and how long each may take."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from benchmarks.gpu_check.runner import OWN_LIMIT
from benchmarks.tune import name_of
from ntpseg.kernels.gemm_configs import PINGPONG_CONFIGS

SECONDS = {"1": 235.0, "2": 235.0, "3": 235.0, "all": 590.0}  # of a slot's 15 minutes, starting the machine aside
STAGES = ("1", "2", "3")
_ENVIRONMENT = (
    "import json, subprocess; from ntpseg.environment import describe; print(json.dumps(describe(), indent=1)); "
    "print(subprocess.run(['nvidia-smi'], capture_output=True, text=True).stdout)"
)
_PINGPONG = "tests/gpu/test_pingpong_cuda.py"
_MEMCHECK = "tests/gpu/test_topn_cuda.py::test_compute_sanitizer[memcheck]"
# The four that the counts of instructions and of operand traffic speak for.
_PROMISING = (
    "128x256x64-w8-s4-tma-flatten-sub2",
    "128x256x64-w8-s4-tma-sub4",
    "128x128x64-w4-s3-tma-sub2-ctas2",
    "128x128x64-w8-s4-tma-flatten",
)


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: in the table and of its log.
        seconds: its share of the stage.
        command: what is run, from the root of the checkout; may hold `OWN_LIMIT`.
    """

    name: str
    seconds: float
    command: tuple[str, ...]


def stage_steps(stage: str, *, native: bool) -> list[Step]:
    """The steps of a stage, or of all of them.

    Args:
        stage: "1" (is it right, how fast, where does the time go), "2" (tuning, the API, many rows,
            attention), "3" (sanitizer, Nsight Compute, peers, a training step) or "all".
        native: the CUDA operators are built already.
    """
    python, results = sys.executable, f"build/gpu-check/stage-{stage}/results"
    build = (python, "setup.py", "-q", "build_ext", "--inplace")
    chosen = {"1": _first, "2": _second, "3": _third}
    steps = [] if native else [Step("build", 150.0, build)]
    for number in STAGES if stage == "all" else (stage,):
        steps += chosen[number](python, results)
    return steps


def _bench(python: str, results: str, name: str, *arguments: str) -> tuple[str, ...]:
    return (python, "-m", "benchmarks", name, "--quick", "--device", "cuda", "--results", results, *arguments)


def _tune(python: str, results: str, *names: str) -> tuple[str, ...]:
    """Candidates of the forward product; none of them is kept, the table is settled by hand."""
    command = (python, "-m", "benchmarks.tune", "--quick", "--dry-run", "--time-limit", OWN_LIMIT)
    folder = f"{results}/tune-{len(names) or 'all'}"  # a later run of tune replaces an earlier one's file
    return (*command, "--results", folder, *(("--only", *names) if names else ()))


def _tests(python: str, *arguments: str, workers: int = 8) -> tuple[str, ...]:
    # compiling dominates, so many processes share the device; what is timed is left to the steps that run alone
    # -vv: one -v takes back the -q of pyproject.toml alone, and no test would be named before the last has ended
    command = (python, "-m", "pytest", "-p", "no:cacheprovider", "-vv", "-rfE", "--tb=short", "-n", str(workers))
    return (*command, "--dist", "worksteal", *arguments)


def _first(python: str, results: str) -> list[Step]:
    loss = _bench(python, results, "loss", "--only", "ntpseg triton", "--where", "R=6272", "--seconds", "1.5")
    timed = "tests/gpu/test_topn_cuda.py::test_timing_targets"
    # the ping-pong product is off by default: were it to hang, the device would be busy for everyone
    left_out = ("--deselect", timed, "--ignore", _PINGPONG)
    tests = _tests(python, "tests/gpu", "tests/generation/test_static_step.py", "-m", "gpu and not slow", *left_out)
    return [
        Step("environment", 15.0, (python, "-c", _ENVIRONMENT)),
        Step("tests", 75.0, tests),
        Step("loss", 50.0, loss),
        Step("timeline", 25.0, (python, "-m", "benchmarks.profile_loss", "--quick", "--no-ncu", "--results", results)),
        Step("topn", 15.0, _bench(python, results, "topn")),
        Step("tune", 50.0, _tune(python, results, *_PROMISING)),
    ]


def _second(python: str, results: str) -> list[Step]:
    loss = ("loss", "--only", "ntpseg triton", "ntpseg triton graph", "--seconds", "2")
    # a kernel that never ends takes its own step alone; its tests are marked with a limit, which no option lowers
    pingpong = _tests(python, _PINGPONG, workers=2)
    return [
        Step("pingpong", 45.0, pingpong),
        Step("tune-pingpong", 45.0, _tune(python, results, *map(name_of, PINGPONG_CONFIGS))),
        Step("graph", 30.0, _bench(python, results, *loss, "--where", "R=6272", "V=32768")),
        Step("rows-32768", 35.0, _bench(python, results, *loss, "--where", "R=32768")),
        Step("attention", 30.0, _bench(python, results, "attention")),
        Step("tune-rest", 60.0, _tune(python, results)),
    ]


def _third(python: str, results: str) -> list[Step]:
    return [
        Step("train", 45.0, _bench(python, results, "train")),
        Step("peers", 60.0, _bench(python, results, "loss")),
        Step("decode", 30.0, _bench(python, results, "decode")),
        Step("ncu", 45.0, (python, "-m", "benchmarks.profile_loss", "--quick", "--results", results)),
        # one of the three tools, alone: together they would each get a third of what one may need
        Step("sanitizer", 75.0, _tests(python, _MEMCHECK, workers=1)),
    ]
