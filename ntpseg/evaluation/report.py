"""One self-contained HTML file about a run."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ntpseg.evaluation.curves import curves
from ntpseg.evaluation.hidden_names import HiddenNames, hide_paths
from ntpseg.evaluation.metrics import METRICS, mm_metrics
from ntpseg.evaluation.pictures import (
    LEVELS,
    Case,
    data_uri,
    entropy_picture,
    probability_contours,
    shrunk,
    token_frames,
)
from ntpseg.evaluation.reliability import reliability_curve
from ntpseg.evaluation.run_directory import TRAINING_LOG, splits, training_log
from ntpseg.evaluation.tables import (
    calibration_rows,
    finding_rows,
    interval,
    metric_rows,
    modality_rows,
    text_check_rows,
    volume_group_rows,
    volume_label,
    volume_rows,
)
from ntpseg.generation.calibration import calibrate
from ntpseg.generation.overlay import PREDICTION, TRUTH, draw
from ntpseg.utils.files import read_csv, write_text
from ntpseg.utils.outputs import check_file, check_not_inputs

MAX_GROUPS = 40
MAX_PAIRED_IMAGES = 4
MAX_PAIRED_SENTENCES = 12


def write_report(
    run: Path,
    out: Path | None = None,
    *,
    split: str | None = None,
    examples: int = 3,
    grey: bool = False,
    hide_names: bool = False,
) -> Path:
    """Write the report of a run from its files; the model is not needed.

    Args:
        run: a run directory; what is missing there (log, evaluation) is left out of the report.
        out: the HTML file, which is replaced, or a folder for ``report.html``; ``RUN/report.html`` by default.
        split: which evaluation to show; test if there is one.
        examples: pictures of the best, the median and the worst cases, each this many.
        grey: show colour images in grey, for CT windows that are stored as colours.
        hide_names: show numbers in place of the names of cases, subjects and files; the run keeps its name, and what is
            burnt into the pixels stays.

    Returns:
        The file.

    Raises:
        ValueError: the run holds neither a log nor an evaluation, has none of `split`, or its images have moved; `out`
            is of another kind, is read, or cannot be written.
    """
    run = Path(run)
    target = run / "report.html" if out is None else out / "report.html" if out.is_dir() else out
    check_file("--out", target, (".html", ".htm"))
    check_not_inputs("--out", [target], _read_files(run))
    evaluated, log = splits(run), training_log(run)
    if not evaluated and not log:
        raise ValueError(f"run must hold eval/*/summary.json or trainer_log.jsonl, got {run} with neither")
    if split is not None and split not in evaluated:
        known = ", ".join(evaluated) or "none"
        raise ValueError(f"split must be one that was evaluated in {run} ({known}), got {split!r}")
    config = run / "config.yaml"
    settings = config.read_text(encoding="utf-8") if config.is_file() else ""
    context: dict[str, Any] = {
        "name": run.resolve().name,
        "curves": curves(log),
        "config": hide_paths(settings) if hide_names and settings else settings,
        "evaluation": None,
        "others": [],
    }
    if evaluated:
        shown = split or evaluated[0]
        context["evaluation"] = _evaluation(run / "eval" / shown, shown, examples, grey, hide_names)
        context["others"] = [(name, metric_rows(_summary(run / "eval" / name))) for name in evaluated if name != shown]
    from jinja2 import Environment, StrictUndefined

    template = resources.files("ntpseg.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    write_text(target, environment.from_string(template).render(context))
    return target


def _read_files(run: Path) -> list[Path]:
    """The files of a run that a report reads, and the images and masks of its cases."""
    files = [run / "config.yaml", run / TRAINING_LOG, *(p for p in run.glob("eval/*/*") if p.is_file())]
    for table in run.glob("eval/*/cases.csv"):
        files += [Path(row[key]) for row in read_csv(table) for key in ("image", "mask") if row.get(key)]
    return files


def _summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def _evaluation(folder: Path, split: str, examples: int, grey: bool, hide_names: bool) -> dict[str, Any]:
    summary = _summary(folder)
    rows = read_csv(folder / "cases.csv")
    names = HiddenNames(rows) if hide_names else None
    cases = [Case(names.row(row) if names else row, folder, i, grey) for i, row in enumerate(rows)]
    if not (folder / "probability.npy").is_file():
        raise ValueError(
            f"evaluation must hold probability.npy, got {folder} of an older version; run ntpseg eval again"
        )
    probability = np.load(folder / "probability.npy", mmap_mode="r")
    grid = np.load(folder / "confidence.npy", mmap_mode="r").shape[1:]
    # The picture is of calibrated probabilities, and the threshold of those before.
    temperature = summary["decoding"].get("calibration_temperature", 1)
    threshold = float(calibrate(np.array(summary["decoding"]["threshold"]), temperature))
    missing = next((c.row[k] for c in cases for k in ("image", "mask") if not Path(c.row[k]).is_file()), None)
    if missing is not None:
        raise ValueError(f"files of {folder / 'cases.csv'} must exist, got {missing}, which is no longer there")
    labels = names.groups(list(summary["groups"])) if names else list(summary["groups"])
    groups = [
        (label, group["cases"], interval(group["per_image"]["dice"]), interval(group["pooled"]["dice"]))
        for label, group in zip(labels, summary["groups"].values())
    ]
    volume_groups = [(names.text(label) if names else label, *scores) for label, *scores in volume_group_rows(summary)]
    return {
        "split": split,
        "data": "" if names else summary.get("data", ""),
        "summary": summary,
        "level": f"{100 * summary['level']:g}",
        "dice": interval(summary["per_image"]["dice"]),
        "pooled": interval(summary["pooled"]["dice"]),
        "metrics": metric_rows(summary),
        "findings": finding_rows(summary),
        "convention": (summary.get("findings") or {}).get("convention", ""),
        "distance_unit": _distance_unit(summary),
        "modalities": modality_rows(summary),
        "volumes": volume_rows(summary),
        "volume_label": volume_label(summary) if summary.get("volumes") else "",
        "volume_groups": volume_groups[:MAX_GROUPS],
        "more_volume_groups": max(0, len(volume_groups) - MAX_GROUPS),
        "text_check": text_check_rows(summary),
        "calibration": calibration_rows(summary),
        "temperature": f"{temperature:g}",
        "reliability": reliability_curve(summary["calibration"]) if "calibration" in summary else "",
        "groups": groups[:MAX_GROUPS],
        "more_groups": max(0, len(groups) - MAX_GROUPS),
        "examples": [
            (title, [_example(case, probability[case.index]) for case in chosen])
            for title, chosen in _extremes(cases, examples)
        ],
        "pairs": _pairs(cases),
        "swaps": _swaps(cases),
        "levels": [(f"{100 * level:g} %", "#{:02x}{:02x}{:02x}".format(*color)) for level, color in LEVELS],
        "tokens": _tokens(cases, probability, grid, threshold),
        "grid": grid,
    }


def _extremes(cases: list[Case], count: int) -> list[tuple[str, list[Case]]]:
    """The best, median and worst cases, none of them twice."""
    order = sorted(cases, key=lambda c: (-c.dice, c.row["case"]))
    if len(order) < 3 * count:
        return [("All cases, best first", order)]
    middle = (len(order) - count) // 2
    return [
        ("Best", order[:count]),
        ("Median", order[middle : middle + count]),
        ("Worst", order[-count:][::-1]),
    ]


def _panels(case: Case, *, other: bool = False) -> dict[str, str]:
    image, truth, prediction = shrunk(case.image(), case.truth(), case.prediction(other))
    return {
        "image": data_uri(image),
        "truth": data_uri(draw(image, truth, TRUTH)),
        "prediction": data_uri(draw(image, prediction, PREDICTION)),
    }


def _example(case: Case, probability: np.ndarray) -> dict[str, Any]:
    small = shrunk(case.image())[0]
    return {
        **_panels(case),
        "probability": data_uri(probability_contours(small, probability)),
        "entropy": data_uri(entropy_picture(small, probability)),
        "agreement": f"; Dice between samples {float(agreement):.2f}"
        if (agreement := case.row.get("sample_dice"))
        else "",
        "mean_confidence": f"{float(case.row['confidence']):.2f}",
        "text": case.row["text"],
        "case": case.row["case"],
        "scores": _caption(case.row),
    }


def _tokens(cases: list[Case], probability: np.ndarray, grid: tuple[int, int], threshold: float) -> dict[str, Any]:
    """The mask of a good case, token by token: the third quarter's, which is neither the best nor a failure."""
    case = sorted(cases, key=lambda c: (c.dice, c.row["case"]))[len(cases) * 3 // 4]
    small = shrunk(case.image())[0]
    return {"frames": token_frames(small, probability[case.index], grid, threshold), "text": case.row["text"]}


def _caption(row: dict[str, str]) -> str:
    known = {m.source: m for m in mm_metrics().values() if m.source and row.get(m.name)}
    shown = [known.get(metric.name, metric) for metric in METRICS.values() if metric.in_captions and metric.name in row]
    return " · ".join(metric.caption(float(row[metric.name])) for metric in shown)


def _distance_unit(summary: dict[str, Any]) -> str:
    cases = {estimate["cases"] for estimate in summary.get("millimetres", {}).values()}
    if not cases:
        return "in pixels of the original image"
    if cases == {summary["cases"]}:
        return "in millimetres"
    return "in pixels of the original image, over all images, and in millimetres over those where they are known"


def _pairs(cases: list[Case]) -> list[list[dict[str, Any]]]:
    """Images that occur with multiple sentences: the most sentences first, of different subjects if possible."""
    by_image: dict[str, list[Case]] = {}
    for case in cases:
        by_image.setdefault(case.row["image_sha1"], []).append(case)
    multiple = [group for group in by_image.values() if len({c.row["text"] for c in group}) > 1]
    multiple.sort(key=lambda group: (-len(group), group[0].row["case"]))
    seen: dict[str, int] = {}
    turns = []
    for group in multiple:
        subject = group[0].row["subject"]
        turns.append(seen.get(subject, 0))
        seen[subject] = turns[-1] + 1
    # Every subject's first image comes before any subject's second.
    chosen = [multiple[i] for i in sorted(range(len(multiple)), key=lambda i: (turns[i], i))[:MAX_PAIRED_IMAGES]]
    return [
        [{**_panels(c), "text": c.row["text"], "dice": f"{c.dice:.3f}"} for c in group[:MAX_PAIRED_SENTENCES]]
        for group in chosen
    ]


def _swaps(cases: list[Case]) -> list[dict[str, Any]]:
    """Images decoded with another image's sentence, for data in which every image has one sentence."""
    checked = [c for c in cases if c.row["other_text"] and c.dice > 0]
    checked.sort(key=lambda c: (float(c.row["other_text_dice"] or 1) - c.dice, c.row["case"]))
    step = max(1, len(checked) // MAX_PAIRED_IMAGES)
    return [
        {
            "right": _panels(c),
            "wrong": _panels(c, other=True)["prediction"],
            "text": c.row["text"],
            "other": c.row["other_text"],
            "dice": f"{c.dice:.3f}",
            "other_dice": f"{float(c.row['other_text_dice']):.3f}",
        }
        for c in checked[::step][:MAX_PAIRED_IMAGES]
    ]
