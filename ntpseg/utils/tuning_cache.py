"""What was measured on a device, kept in the user's cache folder between runs.

A JSON file: ``{"format": 1, "choices": {DEVICE: {VERSION: {CASE: {...}}}}}``. A damaged file, or one of another
version of the package, is passed over with one line in the log: it must not keep anything from starting.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from ntpseg.utils.files import write_json

FORMAT = 1
_logger = logging.getLogger("ntpseg")
_warned: set[Path] = set()


def cache_file(name: str) -> Path:
    """A file in ``$NTPSEG_CACHE``, or in ``ntpseg`` of ``$XDG_CACHE_HOME`` (``~/.cache`` where it is unset)."""
    folder = os.environ.get("NTPSEG_CACHE")
    if folder:
        return Path(folder).expanduser() / name
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ntpseg" / name


def read_choice(path: Path, device: str, version: str, case: str) -> dict[str, Any] | None:
    """What was kept of a case; None where there is nothing, or nothing that can be read."""
    try:
        entry = _choices(path)[device][version][case]
    except KeyError:
        return None
    return entry if isinstance(entry, dict) else None


def save_choice(path: Path, device: str, version: str, case: str, entry: dict[str, Any]) -> None:
    """Add a case to the file, under a temporary name that is then renamed. A folder that cannot be written to is
    passed over with one line in the log.
    """
    choices = _choices(path)
    choices.setdefault(device, {}).setdefault(version, {})[case] = entry
    try:
        write_json(path, {"format": FORMAT, "choices": choices})
    except OSError as error:
        _warn(path, f"{path} could not be written: {error}")


def _choices(path: Path) -> dict[str, Any]:
    """All that the file holds; what is not of its form is left out."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got another file")
        choices = content.get("choices")
        if not isinstance(choices, dict) or not all(
            isinstance(versions, dict) and all(isinstance(cases, dict) for cases in versions.values())
            for versions in choices.values()
        ):
            raise ValueError("choices must be cases per device and version, got others")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _warn(path, f"{path} must be a file that ntpseg wrote, ignored: {error}")
        return {}
    return choices


def _warn(path: Path, message: str) -> None:
    if path not in _warned:
        _warned.add(path)
        _logger.warning("%s", " ".join(message.split()))
