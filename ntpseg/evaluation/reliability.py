"""The reliability curve as inline SVG."""

from __future__ import annotations

from typing import Any

from ntpseg.evaluation.curves import COLOURS, to_svg


def reliability_curve(calibration: dict[str, Any]) -> str:
    """Share of foreground over probability, with and without the temperature, above the pixels of each bin.

    Args:
        calibration: ``summary.json``'s, see `ntpseg.evaluation.calibration.PixelCounts.measures`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    sides = {"uncalibrated": calibration["uncalibrated"]}
    temperature = calibration["calibrated"]["temperature"]
    if temperature != 1:
        sides[f"temperature {temperature:g}"] = calibration["calibrated"]
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(4.6, 4.2), layout="constrained")
        curve, share = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        curve.plot([0, 1], [0, 1], color="#94a3b8", linewidth=1, linestyle="--", label="perfect")
        for (name, side), colour in zip(sides.items(), COLOURS):
            bins = side["bins"]
            known = [row for row in bins if row["pixels"]]
            x = [row["confidence"] for row in known]
            curve.plot(x, [row["frequency"] for row in known], color=colour, marker="o", markersize=3.5, label=name)
            edges = [i / len(bins) for i in range(len(bins) + 1)]
            share.stairs([row["pixels"] for row in bins], edges, color=colour)
        curve.set_ylabel("share of foreground")
        curve.legend(frameon=False, fontsize=8)
        share.set_yscale("log")
        share.set_ylabel("pixels")
        share.set_xlabel("probability of foreground")
        for axes in (curve, share):
            axes.grid(alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        return to_svg(figure)
