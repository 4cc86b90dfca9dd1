"""The accuracy study by one command: train every cell of `cells`, score it, and write the tables.

Every cell is a process of its own and one JSON file; what is there already is not trained again, so a study may be
stopped at any time and gone on with. On another machine a minute is another budget: the tables say so. Choices are made
on the validation split; the test split is scored once for each final model (the cells of the main table).

    python -m benchmarks.accuracy.reproduce qata DATA --out study [--minutes 5 20] [--seeds 3] [--groups main ablation]
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.cells import DECODE_CASES, GROUPS, Cell, ntpseg, qata_cells
from benchmarks.accuracy.study_tables import write_result, write_tables
from benchmarks.harness.environment import device_name
from ntpseg.data import load_records
from ntpseg.training.hardware import resolve_bf16
from ntpseg.utils.files import write_csv, write_json

AUGMENT = {"flip": 0.5, "rotate_degrees": 7.0, "scale": 0.1, "translate": 0.05}
AUGMENT |= {"brightness": 0.05, "contrast": 0.1, "gamma": 0.1}
SIZE = "96"


# What makes two cells the same training run; a row of another table is then the same model.
TRAINING = ("model", "minutes", "seed", "settings", "fraction")


def _training(cell: Cell) -> str:
    return json.dumps([getattr(cell, key) for key in TRAINING], sort_keys=True)


def trained_before(cell: Cell, out: Path) -> dict[str, Any] | None:
    """The result of a finished cell of another table that is the same training run, without its test scores.

    A cell to be scored on the test split and one that only decodes are never taken from another.
    """
    if cell.final or cell.model == "decode":
        return None
    for path in sorted((out / "cells").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        if all(found.get(key) == getattr(cell, key) for key in TRAINING):
            found.pop("test", None)
            return {**found, **asdict(cell), "same_as": found.get("same_as", path.stem)}
    return None


def run_cell(cell: Cell, data: Path, out: Path, threads: int, clock: str) -> dict[str, Any]:
    """Train and score one cell; its result is written to ``out/cells``.

    Raises:
        subprocess.CalledProcessError: a command failed; its output is in ``out/logs``.
    """
    if (known := trained_before(cell, out)) is not None:
        write_json(out / "cells" / f"{cell.name}.json", known)
        return known
    (out / "logs").mkdir(parents=True, exist_ok=True)
    log = out / "logs" / f"{cell.name}.txt"
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    data = subset(data, out, cell)

    def call(*command: str) -> None:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            subprocess.run([sys.executable, "-m", *command], check=True, env=environment, stdout=file, stderr=file)

    started = time.monotonic()
    if cell.model == "decode":
        measured = _decode(cell, out, call)
    elif cell.model == "ntpseg":
        measured = _ntpseg(cell, data, out, clock, call)
    else:
        measured = _baseline(cell, data, out, threads, call)
    seconds = round(time.monotonic() - started, 1)
    result = {**asdict(cell), "seconds": seconds, "machine": _machine(threads), **measured}
    write_json(out / "cells" / f"{cell.name}.json", result)
    return result


def _ntpseg(cell: Cell, data: Path, out: Path, clock: str, call: Any) -> dict[str, Any]:
    run = out / "runs" / cell.name
    settings = [f"{key}={value}" for key, value in cell.settings.items()]
    common = [f"data.path={data}", f"output={run}", f"data.cache={out / 'cache'}", f"seed={cell.seed}"]
    call(
        "ntpseg.cli",
        "train",
        "qata",
        *common,
        f"max_minutes={cell.minutes}",
        f"clock={clock}",
        *settings,
        "--overwrite",
    )
    result: dict[str, Any] = {}
    for split in ("val", "test") if cell.final else ("val",):
        call("ntpseg.cli", "eval", "--model", str(run), "--split", split, "--text-check", "0")
        summary = json.loads((run / "eval" / split / "summary.json").read_text(encoding="utf-8"))
        result[split] = {key: summary[key] for key in ("per_image", "pooled", "cases", "ceiling")}
        result["decoding"] = summary["decoding"]
    lines = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    result["steps"] = lines[-1]["step"]
    choice = run / "decoding_choice.json"
    if choice.is_file():
        result["choice"] = json.loads(choice.read_text(encoding="utf-8"))
    from safetensors import safe_open

    with safe_open(run / "model" / "model.safetensors", "pt") as file:
        names = list(file.keys())  # not a dict
        result["parameters"] = sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    return result


def _decode(cell: Cell, out: Path, call: Any) -> dict[str, Any]:
    run = out / "runs" / ntpseg("main", "ntpseg", cell.minutes, cell.seed).name
    options = [word for key, value in cell.settings.items() for word in (f"--{key}", value) if word]
    target = out / "decoded" / cell.name
    common = ["--split", "val", "--limit", str(DECODE_CASES), "--text-check", "0", "--out", str(target)]
    call("ntpseg.cli", "eval", "--model", str(run), *common, *options)
    summary = json.loads((target / "summary.json").read_text(encoding="utf-8"))
    scores = {key: summary[key] for key in ("per_image", "pooled", "cases", "ceiling")}
    return {"val": scores, "decoding": summary["decoding"]}


def _baseline(cell: Cell, data: Path, out: Path, threads: int, call: Any) -> dict[str, Any]:
    path = out / "logs" / f"{cell.name}.json"
    if cell.model == "text-prior":
        call("benchmarks.accuracy.text_prior", str(data), "--size", SIZE, "--out", str(path))
    else:
        options = [word for key, value in cell.settings.items() for word in (f"--{key}", value)]
        options += ["--network", cell.model, "--minutes", str(cell.minutes), "--seed", str(cell.seed), "--size", SIZE]
        options += ["--threads", str(threads), _bf16(), "--augment", json.dumps(AUGMENT), "--out", str(path)]
        call("benchmarks.accuracy.baseline", str(data), *options, *(["--test"] if cell.final else []))
    result = json.loads(path.read_text(encoding="utf-8"))
    kept = ("val", "test", "threshold", "mirror", "steps", "parameters", "curve", "images_per_second")
    return {key: result[key] for key in kept if key in result}


def _machine(threads: int) -> dict[str, Any]:
    """What a core-minute is worth: cells of one table should have the same."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"device": device_name(device), "threads": threads, "bf16": resolve_bf16("auto"), **versions}


def _bf16() -> str:
    """Baselines multiply in bfloat16 where `ntpseg train` does."""
    return "--bf16" if resolve_bf16("auto") else "--no-bf16"


def subset(data: Path, out: Path, cell: Cell) -> Path:
    """`data`, or a manifest with a fraction of its training pairs, spread evenly, and all of the other splits."""
    if cell.fraction == 1.0:
        return data
    path = out / f"data_{cell.fraction:g}.csv"
    if not path.is_file():
        records = [r for r in load_records(data) if r.mask is not None]
        training = [r for r in records if r.split == "train"]
        count = max(1, round(cell.fraction * len(training)))
        kept = {id(training[i * len(training) // count]) for i in range(count)}
        rows = [r for r in records if r.split != "train" or id(r) in kept]
        lines = [
            [str(Path(r.image).resolve()), str(Path(str(r.mask)).resolve()), r.text, r.split, r.subject, r.mask_value]
            for r in rows
        ]
        write_csv(path, ["image", "mask", "text", "split", "subject", "mask_value"], lines)
    return path


def main(argv: list[str] | None = None) -> int:
    """Run the study; returns 1 if a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("qata",))
    parser.add_argument("data", type=Path, help="the raw folder")
    parser.add_argument("--out", type=Path, default=Path("study"), help="cells, runs, logs and tables")
    parser.add_argument("--minutes", type=float, nargs="+", default=[5.0, 20.0, 60.0], help="core-minutes of training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--only", help="cells whose name matches this pattern, such as 'main_ntpseg_*'")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch threads of a cell")
    parser.add_argument("--jobs", type=int, default=1, help="cells trained at a time")
    parser.add_argument("--list", action="store_true", help="list the cells and stop")
    args = parser.parse_args(argv)
    for name, value in (("--jobs", args.jobs), ("--threads", args.threads), ("--seeds", args.seeds)):
        if value < 1:
            parser.error(f"{name} must be >= 1, got {value}")
    if not args.list and not args.data.is_dir():
        parser.error(f"data must be a folder, got {str(args.data)!r}")
    cells = qata_cells(args.minutes, args.seeds, args.groups)
    cells = [cell for cell in cells if args.only is None or fnmatch.fnmatch(cell.name, args.only)]
    if not cells:
        parser.error(f"--only must match the name of a cell, got {args.only!r}; --list shows them")
    missing = [cell for cell in cells if not (args.out / "cells" / f"{cell.name}.json").is_file()]
    if args.list:
        for cell in cells:
            print(f"{'to do' if cell in missing else 'done '}  {cell.name}")
        runs = {_training(cell): cell for cell in missing}
        print(
            f"{sum(cell.minutes for cell in runs.values() if cell.model != 'decode'):g} core-minutes of training to do"
        )
        return 0
    # A GPU's work does not show in the processor's time.
    clock = "wall" if torch.cuda.is_available() else "cpu"
    failed = []

    def one(cell: Cell) -> None:
        try:
            result = run_cell(cell, args.data, args.out, args.threads, clock)
        except subprocess.CalledProcessError as error:
            failed.append(cell.name)
            print(f"{cell.name}: failed ({error.returncode}), see {args.out / 'logs' / cell.name}.txt", flush=True)
            return
        dice = result["val" if "val" in result else "test"]["per_image"]["dice"]["value"]
        print(f"{cell.name}: Dice {dice:.4f} in {result['seconds']:.0f} s", flush=True)

    # Cells that need another's model come last: to decode it, or because theirs is the same training run.
    trained: set[str] = set()
    own: list[Cell] = []
    for cell in missing:
        if cell.final or (cell.model != "decode" and _training(cell) not in trained):
            own.append(cell)
            trained.add(_training(cell))
    for cells in (own, [cell for cell in missing if cell not in own]):
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(one, cells))
    write_result(args.out, " ".join(["ntpseg", "reproduce", *(sys.argv[1:] if argv is None else argv)]))
    write_tables(args.out)
    print(f"tables in {args.out / 'tables.md'}, all cells in {args.out / 'study.json'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
