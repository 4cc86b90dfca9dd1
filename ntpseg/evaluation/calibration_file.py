"""The temperature of a trained model in its files, beside the threshold and the other choices of how it decodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ntpseg.models.bundle import DECODING, bundle_directory
from ntpseg.utils.files import write_json
from ntpseg.utils.manifest import write_json_member

CHOICE = "decoding_choice.json"
# What the distribution over masks depends on, and the temperature with it.
FITTED = ("method", "passes", "samples", "temperature", "top_p", "mirror")


def check_calibration(run: Path, split: str | None, changes: dict[str, Any]) -> None:
    """Refuse a temperature that would be of other data or another decoding than the model's own.

    Args:
        run: what `save_temperature` is to be called with.
        split: of the data.
        changes: the `FITTED` fields that were given; None where one was not.

    Raises:
        ValueError: a packed model, another split than val, or a decoding that is not the saved one.
    """
    if run.is_file():
        raise ValueError(
            f"--calibrate must be given for a run, got the file {run}; calibrate the run and pack it again"
        )
    if split != "val":
        raise ValueError(f"--calibrate must be given with --split val, which no test score rests on, got {split}")
    for name, value in changes.items():
        if value is not None:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} must be left out with --calibrate, which is of the saved decoding, got {value}")


def save_temperature(run: Path, decoding: dict[str, Any] | None, summary: dict[str, Any]) -> None:
    """Write the temperature of an evaluation into ``decoding.json`` and the run's ``decoding_choice.json``.

    Args:
        run: the run, or its ``model/``.
        decoding: the bundle's; None where it decodes by the defaults.
        summary: of the evaluation that fitted it.
    """
    options = {"method": summary["decoding"]["method"], **(decoding or {})}
    options["calibration_temperature"] = summary["decoding"]["calibration_temperature"]
    model = bundle_directory(run)
    write_json_member(model, DECODING, options)
    path = (model.parent if model.name == "model" else model) / CHOICE
    if model.name == "model":
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"cases": 0, "tried": []}
        calibration = {"cases": summary["cases"], **summary["calibration"]}
        write_json(path, {**known, "options": options, "calibration": calibration})
