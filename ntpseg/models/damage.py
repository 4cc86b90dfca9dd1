"""Which file of a model that cannot be loaded is to blame."""

from __future__ import annotations

import zipfile
from pathlib import Path

from ntpseg.models.bundle import bundle_files
from ntpseg.utils.manifest import unreadable

# A sharded model has an index in place of its one file of weights.
_NEEDED = ("config.json", "sequence.json", "vision/config.json", "vision/model.safetensors")


def damaged_file(directory: str | Path) -> str | None:
    """The first file that is missing or cannot be read, with the reason; None where all look whole."""
    path = Path(directory)
    if path.is_file():
        return _archive(path)
    folder = path / "model" if (path / "model").is_dir() else path
    if not folder.is_dir():
        return f"{folder} is not there"
    for file in sorted(bundle_files(path)):
        reason = unreadable(file)
        if reason:
            return f"{file} is damaged: {reason}"
    for name in _NEEDED:
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
    if not any(folder.glob("model*.safetensors")):
        return f"{folder / 'model.safetensors'} is missing"
    return None


def _archive(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            name = archive.testzip()
    except Exception as error:  # zlib, struct and zipfile have errors of their own
        return f"{path} is no whole archive: {error}"
    return None if name is None else f"{path} is damaged at its entry {name}"
