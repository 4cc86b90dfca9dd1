"""Training curves of a run as inline SVG."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Sequence
from typing import Any

# What one panel shows, in this order; a name also stands for "eval_" + name, the same of the validation split.
PANELS: dict[str, tuple[str, ...]] = {
    "Loss": ("loss",),
    "Parts of the loss": ("ntp", "nktp", "tcl", "het"),
    "Token accuracy": ("token_accuracy",),
    "Dice while training": ("dice", "pooled_dice", "token_dice"),
    "Learning rate": ("learning_rate",),
}
COLOURS = ("#2563eb", "#dc6803", "#0d9488", "#9333ea", "#be123c", "#4d7c0f", "#475569", "#a16207")


def series(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one logged figure."""
    points = [(float(r["step"]), float(r[name])) for r in rows if isinstance(r.get(name), (int, float))]
    return [x for x, _ in points], [y for _, y in points]


def curves(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Title and SVG of every panel for which the log holds at least two points.

    Args:
        rows: of ``trainer_log.jsonl``; each has a ``step``.
    """
    panels = []
    for title, names in PANELS.items():
        lines = []
        for name in names:
            for key in (name, f"eval_{name}"):
                steps, values = series(rows, key)
                if len(steps) > 1:
                    lines.append((key, steps, values))
        if lines:
            panels.append((title, _draw(lines, log=title == "Parts of the loss")))
    return panels


def _smooth(values: list[float]) -> list[float]:
    """A running mean over about a fiftieth of the curve."""
    import numpy as np

    width = max(1, len(values) // 50)
    padded = np.pad(np.asarray(values), (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.full(width, 1 / width), mode="valid").tolist()


def _draw(lines: list[tuple[str, list[float], list[float]]], log: bool) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for (name, steps, values), colour in zip(lines, COLOURS, strict=False):
            if name.startswith("eval_"):
                axes.plot(steps, values, color=colour, marker="o", markersize=3.5, linewidth=1.4, label=name)
                continue
            if len(values) > 100:
                axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
            axes.plot(steps, _smooth(values), color=colour, linewidth=1.6, label=name)
        if log and all(min(values) > 0 for _, _, values in lines):
            axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8)
        return to_svg(figure)


def to_svg(figure: Any) -> str:
    """A figure as inline SVG whose text stays text and whose identifiers are its own in a page of several."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    # Identifiers of several figures in one page would clash.
    salt = f"{zlib.crc32(svg.encode()):08x}"
    svg = re.sub(r'\bid="([^"]+)"', rf'id="\1-{salt}"', svg)
    svg = re.sub(r"(url\(#|href=\"#)([\w.-]+)", rf"\1\2-{salt}", svg)
    return svg[svg.index("<svg") :]
