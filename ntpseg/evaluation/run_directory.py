"""The files of a run directory: ``config.yaml``, ``model/``, ``trainer_log.jsonl``, ``eval/SPLIT/``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ntpseg.data.records import MaskOptions
from ntpseg.data.shards.storage import dataset_url
from ntpseg.utils.files import read_jsonl

TRAINING_LOG = "trainer_log.jsonl"


def run_directory(model: Path) -> Path:
    """The run that `model` is or belongs to; `model` itself where there is no run around it."""
    path = model.resolve()
    if not (path / "config.yaml").is_file() and (path.parent / "config.yaml").is_file():
        return path.parent
    return path


def data_of(run: Path) -> tuple[Path, str]:
    """The data set and its layout that a run was trained on.

    Raises:
        ValueError: there is no ``config.yaml``, it cannot be read, or it names no data set that is there.
    """
    from omegaconf import OmegaConf

    file = run / "config.yaml"
    if not file.is_file():
        raise ValueError(f"--data must name the data set where {file} does not exist, got none")
    try:
        config: Any = OmegaConf.load(file)
        section = config.get("data") or {}
        path, layout = section.get("path"), section.get("layout")
    except Exception as error:  # of YAML, of OmegaConf, of a variable of the environment that is not set here
        reason = " ".join(str(error).split())
        raise ValueError(f"--data must name the data set where {file} cannot be read ({reason}), got none") from error
    if not path:
        raise ValueError(f"--data must name the data set where {file} has no data.path, got none")
    found = Path(str(path)).expanduser()
    if dataset_url(str(path)) is None and not found.exists():
        relative = "" if found.is_absolute() else f", seen from {Path.cwd()}"
        raise ValueError(f"--data must name the data set where data.path of {file} is gone, got {found}{relative}")
    return found, str(layout or "auto")


def masks_of(run: Path) -> MaskOptions:
    """How the masks of a run's own data set are read: its ``data.keep_empty`` and ``data.mask_value``."""
    from omegaconf import OmegaConf

    config: Any = OmegaConf.load(run / "config.yaml")
    section = config.get("data") or {}
    return MaskOptions(bool(section.get("keep_empty", False)), str(section.get("mask_value") or ""))


def training_log(run: Path) -> list[dict[str, Any]]:
    """The rows of ``trainer_log.jsonl``; a line that was cut off is left out."""
    return [row for row in read_jsonl(run / TRAINING_LOG) if "step" in row]


def splits(run: Path) -> list[str]:
    """The evaluated splits of a run, test first."""
    names = (path.parent.name for path in (run / "eval").glob("*/summary.json"))
    return sorted(names, key=lambda name: (name != "test", name))
