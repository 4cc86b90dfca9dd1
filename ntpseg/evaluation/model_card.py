"""The model card of a run: what it was trained on, how well it does, what it must not be used for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ntpseg import __version__
from ntpseg.evaluation.run_directory import splits
from ntpseg.evaluation.tables import calibration_rows, metric_rows


def model_card(run: Path, title: str, license_name: str, data: str) -> str:
    """The card, Markdown with the front matter of the Hugging Face hub.

    Args:
        run: a run of ``ntpseg train``, evaluated or not.
        title: the model's name.
        license_name: under which the weights may be used, an SPDX identifier.
        data: what it was trained on, with the attribution that its licence asks for.

    Raises:
        ValueError: a text is empty: nobody may pass weights on without knowing whose data they are from.
    """
    for name, text in (("title", title), ("license", license_name), ("data", data)):
        if not text.strip():
            raise ValueError(f"--{name} must be a text for the model card, got {text!r}")
    model = json.loads((run / "model" / "config.json").read_text(encoding="utf-8"))
    lines = [
        "---",
        f"license: {license_name.lower()}",
        "library_name: ntpseg",
        "pipeline_tag: image-segmentation",
        "tags: [medical, referring-segmentation, next-token-prediction]",
        "---",
        "",
        f"# {title}",
        "",
        "Segments what a sentence refers to: an image and a sentence in, a mask at the image's own size out.",
        "",
        "```python",
        "from ntpseg.generation import Segmenter",
        "",
        'mask = Segmenter.from_pretrained("MODEL.zip").segment("image.png", "The left lung.").mask',
        "```",
        "",
        "## Training",
        "",
        f"Data: {data}",
        "",
        f"Trained from nothing with ntpseg {__version__}. Images of {model['image_size']} x {model['image_size']} "
        f"pixels, {model['channels']} channel{'s' if model['channels'] != 1 else ''}; masks of "
        f"{model['mask_grid'][0]} x {model['mask_grid'][1]} tokens.",
        "",
        *_slices(run / "model" / "volume.json"),
        "## Evaluation",
        "",
    ]
    for name in splits(run):
        lines += _table(name, json.loads((run / "eval" / name / "summary.json").read_text(encoding="utf-8")))
    if not splits(run):
        lines += ["Not evaluated.", ""]
    lines += [
        "## Limits",
        "",
        "A demonstration, not a medical device. It knows the images, the sentences and the structures of its training "
        "data; on others its masks mean nothing, and it says so nowhere.",
        "",
    ]
    return "\n".join(lines)


def _slices(path: Path) -> list[str]:
    """How the training images were cut out of volumes, where the model remembers that."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    axis, window = known.get("axis"), known.get("window")
    words = [f"{axis} slices of volumes" if axis else "", f"window {window}" if window else ""]
    return [f"Training images: {', '.join(filter(None, words))}.", ""] if any(words) else []


def _table(name: str, summary: dict[str, Any]) -> list[str]:
    rows = [f"| {label} | {mean} | {pooled} |" for label, mean, pooled in metric_rows(summary)]
    return [
        f"The {name} split, {summary['cases']} images of {summary['subjects']} subjects; brackets are bootstrap "
        "intervals over subjects:",
        "",
        "| | per image | pooled |",
        "|---|---|---|",
        *rows,
        "",
        *_calibration(summary),
    ]


def _calibration(summary: dict[str, Any]) -> list[str]:
    """How far the probabilities of an evaluation can be trusted."""
    rows = calibration_rows(summary)
    if not rows:
        return []
    temperature = summary["calibration"]["calibrated"]["temperature"]
    words = "Probabilities of pixels against their truth"
    if temperature == 1:
        return [f"{words}:", "", "| | |", "|---|---|", *(f"| {name} | {figure} |" for name, figure, _ in rows), ""]
    table = [f"| {name} | {before} | {after} |" for name, before, after in rows]
    head = f"| | temperature 1 | temperature {temperature:g} |"
    return [f"{words}; the temperature was fitted on validation:", "", head, "|---|---|---|", *table, ""]
