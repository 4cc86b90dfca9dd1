"""Times the forward product's tiles on this machine's GPU against cuBLAS, and keeps the best: ``ntpseg bench tune``.

    ntpseg bench tune --list                                    # the candidates by name
    ntpseg bench tune --rows 8192 --width 2048 --classes 32768  # for the shapes of your own training
    ntpseg bench tune --only NAME NAME --time-limit 60

Each candidate that compiles without spills is checked against a plain product and timed in turns with cuBLAS
(``torch.mm`` into a bf16 matrix, on the same operands) and with the tile of `ntpseg.kernels.gemm_configs`. Ratios are
to cuBLAS, so they carry the epilogue's cost too. Rows are written after each candidate. A tile that is at least 1 %
faster than the table's over all shapes is kept for this device and version of Triton, in a file that the kernels read
(`ntpseg.kernels.tuned_configs`).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ntpseg
from benchmarks.harness import Case, Comparison, DeviceLost, Provider, Settings, check_errors, relative_error, run_case
from benchmarks.harness.comparison import first_line
from benchmarks.harness.environment import describe, slug
from benchmarks.harness.resources import compiled_kernels, resource_usage
from benchmarks.harness.rows import RESULTS, Row, write
from benchmarks.harness.timing import Budget
from benchmarks.suite import parse_device
from ntpseg.kernels.anchored_gemm import anchored_gemm
from ntpseg.kernels.gemm_configs import GEMM_CONFIGS, PINGPONG_CONFIGS, GemmConfig, architecture, persistent_grid
from ntpseg.kernels.matmul import matmul
from ntpseg.kernels.tuned_configs import read_choice, save_choice, triton_version
from ntpseg.kernels.workspace import Anchors, BlockStats

CANDIDATES: dict[str, tuple[GemmConfig, ...]] = {
    "sm_80": (
        GemmConfig(128, 256, 32, num_warps=8, num_stages=3, TMA=False),
        GemmConfig(128, 128, 64, num_warps=8, num_stages=3, TMA=False),
        GemmConfig(128, 128, 32, num_warps=4, num_stages=4, TMA=False, ctas_per_sm=2),
    ),
    "sm_90": (
        GemmConfig(128, 256, 64, num_warps=8, num_stages=4, TMA=True, FLATTEN=True, EPILOGUE_SUBTILE=2),
        GemmConfig(128, 256, 64, num_warps=8, num_stages=4, TMA=True, EPILOGUE_SUBTILE=4),
        GemmConfig(128, 256, 64, num_warps=8, num_stages=4, TMA=True, FLATTEN=True, EPILOGUE_SUBTILE=4, GROUP_SIZE_M=4),
        GemmConfig(
            128, 256, 64, num_warps=8, num_stages=4, TMA=True, FLATTEN=True, EPILOGUE_SUBTILE=4, GROUP_SIZE_M=16
        ),
        GemmConfig(128, 256, 64, num_warps=8, num_stages=3, TMA=True, EPILOGUE_SUBTILE=1),
        GemmConfig(128, 256, 64, num_warps=8, num_stages=3, TMA=True, FLATTEN=True, EPILOGUE_SUBTILE=1),
        GemmConfig(256, 128, 64, num_warps=8, num_stages=4, TMA=True, FLATTEN=True, EPILOGUE_SUBTILE=2),
        GemmConfig(128, 128, 64, num_warps=4, num_stages=3, TMA=True, EPILOGUE_SUBTILE=2, ctas_per_sm=2),
        GemmConfig(128, 128, 64, num_warps=4, num_stages=3, TMA=True, FLATTEN=True, EPILOGUE_SUBTILE=4, ctas_per_sm=2),
        GemmConfig(128, 128, 64, num_warps=8, num_stages=4, TMA=True, FLATTEN=True),
        *PINGPONG_CONFIGS,
    ),
    "sm_100": (
        GemmConfig(128, 128, 64, num_warps=8, num_stages=4, TMA=True),
        GemmConfig(128, 128, 64, num_warps=8, num_stages=5, TMA=True, FLATTEN=True, EPILOGUE_SUBTILE=2),
        GemmConfig(128, 256, 64, num_warps=8, num_stages=4, TMA=True, EPILOGUE_SUBTILE=4),
    ),
}
LIBRARY = "cuBLAS"
LEAST_GAIN = 0.99  # a tile is kept where its time is at most this of the table's: less is noise
_CHECKED_ROWS = 256
_LIMITS = {"e": 4e-3, "row_sum": 1e-4, "row_max": 1e-4, "argmax": 1e-4}


def name_of(config: GemmConfig) -> str:
    """A short name: tile, warps, stages, and whatever differs from the defaults."""
    parts = [f"{config.BLOCK_M}x{config.BLOCK_N}x{config.BLOCK_K}", f"w{config.num_warps}", f"s{config.num_stages}"]
    short = {"EPILOGUE_SUBTILE": "sub", "GROUP_SIZE_M": "group", "ctas_per_sm": "ctas"}
    for field in dataclasses.fields(config)[5:]:
        value = getattr(config, field.name)
        if value is True:
            parts.append(field.name.lower())
        elif value is not False and value != field.default:
            parts.append(f"{short.get(field.name, field.name.lower())}{value}")
    return "-".join(parts)


@dataclass(frozen=True)
class Operands:
    """Of one shape.

    Attributes:
        hidden, weight: ``[R, D]`` and ``[V, D]`` bf16.
        anchors: logits are measured from 0.
        e, z: ``[R, >= V]`` bf16, what the kernel and the library write.
    """

    hidden: Tensor
    weight: Tensor
    anchors: Anchors
    e: Tensor
    z: Tensor

    @staticmethod
    def random(rows: int, classes: int, width: int, device: torch.device) -> Operands:
        """Standard normal logits."""
        hidden = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
        weight = torch.randn(classes, width, device=device, dtype=torch.bfloat16) * width**-0.5
        z_y = torch.zeros(rows, device=device)
        e, z = torch.empty(2, rows, -(-classes // 64) * 64, device=device, dtype=torch.bfloat16)
        return Operands(hidden, weight, Anchors(z_y, z_y.clone(), z_y + 48.0), e, z)


class ForwardProduct:
    """One step of a candidate: the launch over all rows."""

    def __init__(self, operands: Operands, config: GemmConfig) -> None:
        rows, classes, device = len(operands.hidden), len(operands.weight), operands.hidden.device
        self.operands, self.block_stats = operands, BlockStats.empty(-(-classes // config.BLOCK_N), rows, device)
        blocks = -(-rows // config.BLOCK_M)
        grid = persistent_grid(config, blocks * self.block_stats.row_sum.shape[0], device)
        o = operands
        self.launch = partial(
            anchored_gemm, o.hidden, o.weight, o.e, o.anchors, self.block_stats, None, None, config, grid
        )

    def __call__(self) -> None:
        self.launch()

    def errors(self) -> dict[str, float]:
        """Runs a step and compares some rows with a plain product in fp32.

        Raises:
            Inaccurate: E or a statistic of the rows is wrong.
        """
        o, stats = self.operands, self.block_stats
        classes, device = len(o.weight), o.hidden.device
        for left_over in (o.e, stats.row_sum, stats.row_max):
            left_over.fill_(torch.nan)
        self()
        rows = torch.linspace(0, len(o.hidden) - 1, min(len(o.hidden), _CHECKED_ROWS), device=device).long()
        z = torch.empty(len(rows), classes, dtype=torch.float32, device=device)
        matmul(o.hidden[rows], o.weight.t(), z)
        top = z.amax(1)
        row_max, block = stats.row_max[:, rows].max(0)
        argmax = stats.argmax[block, rows].long().clamp(0, classes - 1)
        e, padding = o.e[rows, :classes], o.e[rows, classes:]
        errors = {
            "e": relative_error(e, z.exp().double()) if not padding.count_nonzero() else math.inf,
            "row_sum": float((stats.row_sum[:, rows].sum(0) / z.exp().sum(1) - 1).abs().max()),
            "row_max": float((row_max - top).abs().max()),
            "argmax": float((top - z.gather(1, argmax.unsqueeze(1)).squeeze(1)).max()),
        }
        return check_errors(errors, _LIMITS)


def comparison(
    rows: int, classes: int, width: int, settings: Settings, candidates: Sequence[GemmConfig] | None = None
) -> Comparison:
    """The library's product, the tile of the table, and candidates (all of the architecture by default)."""
    device = settings.device
    operands = Operands.random(rows, classes, width, device)
    architecture_name = architecture(device)
    library = partial(torch.mm, operands.hidden, operands.weight.t(), out=operands.z[:, :classes])
    providers = {LIBRARY: Provider(lambda: library)}
    table = GEMM_CONFIGS[architecture_name].forward
    for config in (table, *(CANDIDATES[architecture_name] if candidates is None else candidates)):
        reason = None if config == table else spills(operands, config)
        setup: Callable[[], ForwardProduct] = partial(ForwardProduct, operands, config)
        providers[name_of(config)] = Provider(setup, ForwardProduct.errors, reason, "E and row statistics")
    flops = 2.0 * rows * classes * width
    return Comparison(providers, LIBRARY, flops=flops, graphs=False, dtype=torch.bfloat16)


def spills(operands: Operands, config: GemmConfig) -> str | None:
    """Why a candidate is not worth a measurement: it is compiled, and its machine code read; None where it is."""
    if operands.hidden.device.type != "cuda":
        return None
    try:
        kernels = compiled_kernels(ForwardProduct(operands, config))
        spilled = max(resource_usage(kernel.asm["cubin"]).spilled for kernel in kernels)
    except Exception as error:  # the row of the launch, which fails alike, would say less
        return f"does not compile: {type(error).__name__}: {first_line(error)}"
    return f"registers spill: {spilled} bytes per thread" if spilled else None


def gain_of(rows: Sequence[Row], config: GemmConfig, table: GemmConfig, cases: int) -> float | None:
    """Geometric mean over the cases of a candidate's time over the table's; None where a case has none."""
    seconds: dict[str, dict[str, float]] = {}
    for row in rows:
        if "seconds" in row:
            seconds.setdefault(row["contestant"], {})[str(row["case"])] = row["seconds"]["median"]
    ours, theirs = (seconds.get(name_of(tile), {}) for tile in (config, table))
    if len(ours) != cases or ours.keys() != theirs.keys():
        return None
    return math.exp(sum(math.log(ours[case] / theirs[case]) for case in ours) / cases)


@dataclass
class Tuning:
    """One run.

    Attributes:
        settings: device and rounds.
        shapes: ``(R, V, D)`` each.
        path: where the rows go.
        save: whether the best tile is kept for later runs.
        deadline: of `time.monotonic`, after which no candidate is begun.
        rows: of all candidates so far.
        gains: of each candidate that is right and was timed on all shapes, see `gain_of`.
    """

    settings: Settings
    shapes: Sequence[tuple[int, int, int]]
    path: Path
    save: bool = True
    deadline: float = math.inf
    rows: list[Row] = dataclasses.field(default_factory=list)
    gains: dict[GemmConfig, float] = dataclasses.field(default_factory=dict)

    def run(self, candidates: Sequence[GemmConfig]) -> int:
        """Times them; returns 1 where one is wrong or failed, else 0."""
        table, longest, failed = GEMM_CONFIGS[architecture(self.settings.device)].forward, 0.0, False
        stored = self._stored()
        for number, config in enumerate(candidates):
            start = time.monotonic()
            if start + longest > self.deadline:
                print(f"stopped at the time limit: {number} of {len(candidates)} candidates were timed", flush=True)
                break
            rows = self._candidate(config)
            failed |= any(row["status"] in ("wrong", "failed") for row in rows)
            gain = gain_of(rows, config, table, len(self.shapes))
            if gain is not None:
                self.gains[config] = gain
            if self.save and (gain is not None or config == stored):
                self._keep(stored)
            longest = max(longest, time.monotonic() - start)
        print(f"rows written to {self.path}")
        return 1 if failed else 0

    def _candidate(self, config: GemmConfig) -> list[Row]:
        rows: list[Row] = []
        for shape in self.shapes:
            parameters = dict(zip("RVD", shape, strict=True))
            build = partial(_build, *shape, config)
            try:
                case_rows = run_case(Case("tune", parameters, build), self.settings)
            except DeviceLost:
                reason = "it left the device unusable: leave it out with --only"
                lost = {"benchmark": "tune", "case": parameters, "contestant": name_of(config), "does": ""}
                self.rows.append({**lost, **describe(self.settings.device), "status": "failed", "reason": reason})
                write(self.path, self.rows)
                raise SystemExit(f"ntpseg bench: {name_of(config)} left the device unusable; leave it out") from None
            for row in case_rows:
                if row["contestant"] == name_of(config):
                    row["config"] = dataclasses.asdict(config)
                print(_line(row), flush=True)
            rows += case_rows
            self.rows += case_rows
            write(self.path, self.rows)
        return rows

    def _stored(self) -> GemmConfig | None:
        return read_choice(_device_name(self.settings.device), triton_version())

    def _keep(self, stored: GemmConfig | None) -> None:
        """Writes the best so far, or takes a choice away that has lost to the table."""
        best = min(self.gains, key=self.gains.__getitem__, default=None)
        if best is not None and self.gains[best] > LEAST_GAIN:
            best = None
        if best is None and stored is None:
            return
        evidence: dict[str, Any] = {}
        if best is not None:
            evidence = {
                "time_over_table": round(self.gains[best], 4),
                "shapes": [dict(zip("RVD", shape, strict=True)) for shape in self.shapes],
                "measured": date.today().isoformat(),
                "versions": {"ntpseg": ntpseg.__version__, "torch": torch.__version__},
            }
        try:
            path = save_choice(_device_name(self.settings.device), triton_version(), best, evidence)
        except OSError as error:
            print(f"ntpseg bench: the choice could not be kept: {error}", flush=True)
            return
        kept = "the table's tile" if best is None else f"{name_of(best)}, {self.gains[best]:.3f} of the table's time,"
        print(f"  kept: {kept} in {path}", flush=True)


def _build(rows: int, classes: int, width: int, config: GemmConfig, settings: Settings) -> Comparison:
    return comparison(rows, classes, width, settings, (config,))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _line(row: Row) -> str:
    case = " ".join(f"{key} {value}" for key, value in row["case"].items())
    name = f"{case:<26} {row['contestant']:<44}"
    if "seconds" not in row:
        return f"{name} {row['status']}: {row.get('reason') or row.get('error')}"
    ratio = row["ratio"]
    return (
        f"{name} {row['seconds']['median'] * 1e3:9.3f} ms  x {ratio['median']:.3f} of {LIBRARY} "
        f"[{ratio['p25']:.3f}, {ratio['p75']:.3f}]"
    )


def parser() -> argparse.ArgumentParser:
    """All options."""
    options = argparse.ArgumentParser(
        prog="ntpseg bench tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--rows", type=int, nargs="+", default=[6272], help="R: supervised rows of a batch")
    options.add_argument("--classes", type=int, nargs="+", help="V; 32768 and 184622")
    options.add_argument("--width", type=int, nargs="+", default=[1024, 2048, 4096], help="D")
    options.add_argument("--quick", action="store_true", help="V = 32768 alone, and half of the rounds")
    options.add_argument("--only", nargs="+", metavar="NAME", help="these candidates, in this order; --list shows all")
    options.add_argument("--list", action="store_true", help="name the candidates of every architecture and stop")
    options.add_argument("--repetitions", type=int, help="rounds per shape and candidate; 30")
    options.add_argument("--time-limit", type=float, metavar="SECONDS", help="stop after this, with what there is")
    options.add_argument("--dry-run", action="store_true", help="do not keep the best tile for later runs")
    options.add_argument("--device", default="cuda", help="a CUDA device")
    options.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON rows")
    return options


def selected(architecture_name: str, only: Sequence[str] | None, stored: GemmConfig | None) -> list[GemmConfig]:
    """The candidates to time: all or those named, and one that was kept earlier, first.

    Raises:
        ValueError: a name is none of theirs.
    """
    named = {name_of(config): config for config in CANDIDATES.get(architecture_name, ())}
    for name in only or ():
        if name not in named:
            raise ValueError(f"only must name candidates of {architecture_name} ({', '.join(named)}), got {name!r}")
    chosen = [named[name] for name in only] if only else list(named.values())
    if stored is not None and stored != GEMM_CONFIGS[architecture_name].forward:
        chosen = [stored, *(config for config in chosen if config != stored)]
    return list(dict.fromkeys(chosen))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 where a candidate is wrong or failed.

    Raises:
        ValueError: there is no such device, or an option is no value that it can have.
    """
    args = parser().parse_args(arguments)
    if args.list:
        for name, configs in CANDIDATES.items():
            print(f"{name}, in use: {name_of(GEMM_CONFIGS[name].forward)}")
            print("".join(f"  {name_of(config)}\n" for config in configs), end="")
        return 0
    for name in ("rows", "classes", "width"):
        for value in getattr(args, name) or ():
            if value < 1 or (name == "width" and value % 8):
                wanted = "a multiple of 8" if name == "width" else "an integer >= 1"
                raise ValueError(f"{name} must be {wanted}, got {value}")
    if args.repetitions is not None and args.repetitions < 1:
        raise ValueError(f"repetitions must be an integer >= 1, got {args.repetitions}")
    if args.time_limit is not None and not 0 < args.time_limit < threading.TIMEOUT_MAX:
        raise ValueError(f"time-limit must be seconds > 0, got {args.time_limit:g}")
    device = parse_device(args.device)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(f"device must be a CUDA device for tuning, got {'none' if device.type == 'cuda' else device}")
    with torch.cuda.device(device):
        return _tune(device, args)


def _tune(device: torch.device, args: argparse.Namespace) -> int:
    repetitions = args.repetitions or (15 if args.quick else 30)
    budget = Budget(seconds=0.0, min_rounds=repetitions, max_rounds=repetitions, warmup=3)
    classes = args.classes or ([32768] if args.quick else [32768, 184622])
    shapes = [(rows, v, width) for v, width, rows in itertools.product(classes, args.width, args.rows)]
    path = args.results / f"tune-{device.type}-{slug(describe(device)['device'])}.json"
    tuning = Tuning(Settings(device, budget), shapes, path, save=not args.dry_run)
    candidates = selected(architecture(device), args.only, tuning._stored() if tuning.save else None)
    if args.time_limit is None:
        return tuning.run(candidates)
    tuning.deadline = time.monotonic() + args.time_limit
    # a kernel that never ends blocks the main thread in the driver, where no signal reaches it
    watchdog = threading.Timer(args.time_limit, _give_up, (path,))
    watchdog.daemon = True
    watchdog.start()
    try:
        return tuning.run(candidates)
    finally:
        watchdog.cancel()
        watchdog.join()


def _give_up(path: Path) -> None:
    print(f"ntpseg bench: out of time in the middle of a candidate; rows of those before it are in {path}", flush=True)
    os._exit(1)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"ntpseg bench: {error}", file=sys.stderr)
        sys.exit(2)
