"""The tokenizer report: one HTML file with originals beside their reconstructions, and what the codes lose."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ntpseg.tokenizers.quality import Reconstruction, TokenizerQuality
from ntpseg.tokenizers.vision import VisionTokenizer
from ntpseg.utils.files import write_text

_MIN_SIDE = 192
_BINS = 20
_MISSED, _ADDED = (64, 200, 120), (255, 96, 64)


def write_report(path: Path, vision: VisionTokenizer, quality: TokenizerQuality, title: str) -> None:
    """Write the report; every picture is inside the file."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ntpseg.tokenizers", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    rows = [
        {
            "case": example.case,
            "text": example.text,
            "dice": f"{example.dice:.3f}",
            "psnr": f"{example.psnr:.1f}",
            "pictures": _pictures(example),
        }
        for example in quality.examples
    ]
    html = environment.get_template("report.html").render(
        title=title,
        summary=quality.summary(),
        facts=_facts(vision),
        rows=rows,
        histogram=_histogram(quality.dice),
    )
    write_text(path, html)


def _facts(vision: VisionTokenizer) -> list[tuple[str, Any]]:
    h, w = vision.mask_grid
    shared = " (shared)" if vision.shared_codebook else ""
    return [
        ("tokenizer", type(vision).__name__),
        ("input", f"{vision.image_size} x {vision.image_size}, {vision.channels} channel(s)"),
        ("pixels per code", f"{vision.factor} x {vision.factor}"),
        ("grid", f"{h} x {w} = {h * w} tokens"),
        ("image codes", f"{vision.image_codes}{shared}"),
        ("mask codes", f"{vision.mask_codes}{shared}"),
    ]


def _pictures(example: Reconstruction) -> list[tuple[str, str]]:
    """Caption and data URI of each tile of an example."""
    mask, decoded = example.mask[0] > 0.5, example.decoded_mask[0] > 0.5
    grey = np.repeat((mask & decoded)[..., None] * np.uint8(150), 3, axis=2)
    grey[mask & ~decoded] = _MISSED
    grey[decoded & ~mask] = _ADDED
    return [
        ("image", _data_uri(_grey(example.image))),
        ("reconstruction", _data_uri(_grey(example.decoded_image))),
        ("mask", _data_uri(mask * np.uint8(255))),
        ("reconstruction", _data_uri(decoded * np.uint8(255))),
        ("difference", _data_uri(grey)),
    ]


def _grey(image: np.ndarray) -> np.ndarray:
    """Uint8 [S, S] or [S, S, 3] of float [C, S, S] in [-1, 1]."""
    pixels = ((image.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
    return pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)


def _data_uri(pixels: np.ndarray) -> str:
    picture = Image.fromarray(pixels)
    # Whole multiples of the size, so that a pixel stays a square that can be counted.
    factor = -(-_MIN_SIDE // picture.width)
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _histogram(dice: np.ndarray) -> list[tuple[str, int, float]]:
    """Range, count and height in percent of each bar, from the lowest Dice to 1."""
    low = min(0.8, float(np.floor(dice.min() * 10) / 10))
    counts, edges = np.histogram(dice, bins=_BINS, range=(low, 1.0))
    return [
        (f"{a:.2f} to {b:.2f}", int(n), 100 * n / max(1, counts.max()))
        for n, a, b in zip(counts, edges[:-1], edges[1:], strict=True)
    ]
