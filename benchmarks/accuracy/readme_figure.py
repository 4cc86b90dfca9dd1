"""The README's figure: one test image, three sentences about it, and the masks that a finished run predicts for them.

    python -m benchmarks.accuracy.readme_figure RUN OUT.png [--split test] [--files FILE FILE FILE]

Nothing is picked by eye: the image is the one whose mean Dice is the median over images, its sentences are those at the
quartiles of its Dice. RUN must have been evaluated (``ntpseg eval --model RUN``). Prints the caption.
"""

from __future__ import annotations

import argparse
import io
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ntpseg.data import read_image, read_mask
from ntpseg.utils.files import read_csv

PREDICTION, TRUTH = "#00c8ff", "#5af05a"
PANEL_INCHES, DPI = 2.6, 140


def choose(rows: Sequence[dict[str, str]], files: Sequence[str] = ()) -> list[dict[str, str]]:
    """The rows of ``cases.csv`` that are shown, best first; `files` names them in place of the rule.

    Raises:
        ValueError: a file is not in the table, or the files have different images.
    """
    if files:
        by_file = {row["file"]: row for row in rows}
        unknown = [name for name in files if name not in by_file]
        if unknown:
            raise ValueError(f"files must be in the column file of cases.csv, got {', '.join(unknown)}")
        chosen = [by_file[name] for name in files]
        if len({row["image_sha1"] for row in chosen}) > 1:
            raise ValueError(f"files must belong to one image, got {', '.join(files)}")
        return chosen
    images: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        images.setdefault(row["image_sha1"], []).append(row)
    by_mean = sorted(images.values(), key=lambda cases: statistics.fmean(_dice(row) for row in cases))
    cases = sorted(by_mean[len(by_mean) // 2], key=_dice, reverse=True)
    places = dict.fromkeys(round(quantile * (len(cases) - 1)) for quantile in (0.25, 0.5, 0.75))
    return [cases[place] for place in places]


def draw(cases: Sequence[dict[str, str]], masks: Path) -> bytes:
    """A PNG of the image and, for each case, its sentence, predicted mask and true outline.

    Args:
        cases: rows of ``cases.csv`` about one image.
        masks: folder of the predicted masks.
    """
    from matplotlib.figure import Figure
    from PIL import Image

    image = read_image(cases[0]["image"])
    grey = image if image.ndim == 2 else image.mean(2)  # windows of a CT in the place of colours
    height, width = grey.shape
    panels = len(cases) + 1
    size = (PANEL_INCHES * panels, PANEL_INCHES * height / width + 0.62)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots(1, panels)
    for axis in axes:
        axis.imshow(grey, cmap="gray", interpolation="bilinear")
        axis.set_axis_off()
    axes[0].set_title("image", fontsize=9)
    for axis, case in zip(axes[1:], cases, strict=True):
        prediction, truth = (
            read_mask(masks / f"{case['file']}.png"),
            read_mask(case["mask"], case.get("mask_value", "")),
        )
        _contour(axis, truth, TRUTH, linewidths=1.0, linestyles="dashed")
        _contour(axis, prediction, PREDICTION, linewidths=1.4)
        axis.contourf(prediction.astype(float), levels=(0.5, 1.5), colors=PREDICTION, alpha=0.3)
        axis.set_title(textwrap.fill(f"“{case['text']}”", 42), fontsize=9)
        axis.text(0.5, -0.02, f"Dice {_dice(case):.2f}", ha="center", va="top", fontsize=8, transform=axis.transAxes)
    rendered, png = io.BytesIO(), io.BytesIO()
    figure.savefig(rendered, format="png")
    # a palette takes a third of the bytes and is not seen on a grey image with two colours
    Image.open(rendered).convert("RGB").quantize(192, dither=Image.Dither.NONE).save(png, format="PNG", optimize=True)
    return png.getvalue()


def _contour(axis: Any, mask: np.ndarray, color: str, **style: Any) -> None:
    if mask.any():
        axis.contour(mask.astype(float), levels=(0.5,), colors=color, **style)


def _dice(row: dict[str, str]) -> float:
    return float(row["dice"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path, help="PNG file")
    parser.add_argument("--split", default="test")
    parser.add_argument("--files", nargs="+", default=[], help="cases of one image, as cases.csv calls them")
    args = parser.parse_args(arguments)
    folder = args.run / "eval" / args.split
    if not (folder / "cases.csv").is_file():
        raise ValueError(f"run must have eval/{args.split}/cases.csv, which ntpseg eval writes, got {args.run}")
    rows = read_csv(folder / "cases.csv")
    cases = choose(rows, args.files)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(draw(cases, folder / "masks"))
    mean = statistics.fmean(_dice(row) for row in rows)
    print(f"{args.out}: {args.out.stat().st_size / 1024:.0f} KiB; {cases[0]['subject']}, {args.split} split, ", end="")
    print(f"mean Dice of its {len(rows)} pairs {mean:.3f}; blue: predicted, green: true outline")


if __name__ == "__main__":
    main()
