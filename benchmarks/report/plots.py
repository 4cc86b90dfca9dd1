"""Plots as small SVG files that do not change where the rows do not."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.rows import Row
from benchmarks.report.tables import case_name, group
from ntpseg.utils.files import write_text

_CASES = 6


def draw(rows: Sequence[Row], folder: Path, name: str) -> list[tuple[str, Path]]:
    """Speed, memory and roofline of one benchmark on one device.

    Args:
        rows: of one benchmark and device.
        folder: where the files go.
        name: their common beginning.

    Returns:
        Titles and paths of the plots that there was something to draw for.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "ntpseg", "svg.fonttype": "none", "font.size": 8})
    timed = [row for row in rows if "seconds" in row]
    plots = []
    for title, call in (("Speed", _speed), ("Memory", _memory), ("Roofline", _roofline)):
        figure = call(timed) if timed else None
        if figure is None:
            continue
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        path = folder / f"{name}-{title.lower()}.svg"
        write_text(path, svg.getvalue())
        plots.append((title, path))
    return plots


def _speed(rows: Sequence[Row]) -> Any:
    return _bars(rows, lambda row: row["ratio"]["median"], f"time over {rows[0]['reference']}", _whiskers)


def _memory(rows: Sequence[Row]) -> Any:
    with_memory = [row for row in rows if row.get("memory") and row["contestant"] != row["reference"]]
    if not with_memory:
        return None
    return _bars(
        with_memory, lambda row: max(row["memory"]["delta"] / 2**20, 0.1), "extra memory at the peak, MiB", None
    )


def _subset(cases: list[list[Row]]) -> list[list[Row]]:
    """As many as a picture can show, from the first to the last."""
    if len(cases) <= _CASES:
        return cases
    return [cases[round(place * (len(cases) - 1) / (_CASES - 1))] for place in range(_CASES)]


def _whiskers(row: Row) -> tuple[float, float]:
    ratio = row["ratio"]
    return ratio["median"] - ratio["p25"], ratio["p75"] - ratio["median"]


def _bars(rows: Sequence[Row], value: Any, label: str, whiskers: Any) -> Any:
    from matplotlib.figure import Figure

    cases = _subset(list(group(rows, "case").values()))
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    figure = Figure(figsize=(9, 0.16 * len(cases) * len(names) + 1.4), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(cases)
    for number, case in enumerate(cases):
        by_name = {row["contestant"]: row for row in case}
        present = [name for name in names if name in by_name]
        y = [names.index(name) + number * height for name in present]
        values = [value(by_name[name]) for name in present]
        error = None
        if whiskers is not None:
            error = list(zip(*(whiskers(by_name[name]) for name in present), strict=True))
        axes.barh(y, values, height, xerr=error, label=case_name(case[0]), error_kw={"linewidth": 0.6})
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(names))], names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.grid(axis="x", linewidth=0.3)
    axes.legend(fontsize=6)
    return figure


def _roofline(rows: Sequence[Row]) -> Any:
    from matplotlib.figure import Figure

    points = [row for row in rows if row["work"]["flops"] and row["work"]["bytes"] and "ceiling" in row]
    if not points:
        return None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    intensity = {id(row): row["work"]["flops"] / row["work"]["bytes"] for row in points}
    ends = (min(intensity.values()) / 4, max(intensity.values()) * 4)
    for (dtype,), same in group(points, "dtype").items():
        top = same[0]["ceiling"]["flops_per_second"]
        slope = same[0]["ceiling"]["bytes_per_second"]
        ridge = top / slope
        x = sorted({*ends, min(max(ridge, ends[0]), ends[1])})
        axes.plot(x, [min(top, slope * at) / 1e9 for at in x], linewidth=1, label=f"ceiling, {dtype}")
    for (name,), same in group(points, "contestant").items():
        y = [row["work"]["flops"] / row["seconds"]["median"] / 1e9 for row in same]
        axes.plot([intensity[id(row)] for row in same], y, "o", markersize=3, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs per byte that must be moved")
    axes.set_ylabel("GFLOP/s")
    axes.grid(linewidth=0.3)
    axes.legend(fontsize=6, ncols=2)
    return figure
