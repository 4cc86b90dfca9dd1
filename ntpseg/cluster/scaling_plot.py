"""A picture of scaling curves: tokens/s beside a straight line, and the efficiency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ntpseg.cluster.scaling import Curves, ScalingPoint
from ntpseg.utils.files import atomic_open

_LINES = {"weak": "-", "strong": "--"}


def plot_scaling(curves: Sequence[Curves], title: str, path: Path) -> None:
    """Write the picture; the format is that of the file's name (png, svg, pdf).

    Args:
        curves: one of each strategy.
        title: of the picture.
        path: of the file.
    """
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "ntpseg", "font.size": 9}):
        figure = _figure(curves, title)
        with atomic_open(path) as file:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(file, format=path.suffix[1:].lower(), dpi=120, metadata=metadata)


def _figure(curves: Sequence[Curves], title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.4), layout="constrained")
    speed, share = figure.subplots(1, 2)
    for number, each in enumerate(curves):
        for name, points in (("weak", each.weak), ("strong", each.strong)):
            style: dict[str, Any] = {"color": f"C{number}", "linestyle": _LINES[name], "marker": ".", "markersize": 3}
            label = f"{each.options.strategy}, {name}"
            speed.plot(*_columns(points, "tokens_per_second"), label=label, **style)
            share.plot(*_columns(points, "efficiency"), label=label, **style)
    ideal = curves[0].weak
    rates = [ideal[0].tokens_per_second * point.gpus for point in ideal]
    speed.plot([point.gpus for point in ideal], rates, color="0.6", linewidth=0.8, label="straight line")
    speed.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="tokens/s (predicted)")
    share.set(xscale="log", ylim=(0.0, 1.05), xlabel="GPUs", ylabel="efficiency (predicted)")
    for axes in (speed, share):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.grid(True, linewidth=0.3)
    speed.legend(fontsize=7, handlelength=4)
    figure.suptitle(title, fontsize=10)
    return figure


def _columns(points: Sequence[ScalingPoint], name: str) -> tuple[list[int], list[float]]:
    return [point.gpus for point in points], [getattr(point, name) for point in points]
