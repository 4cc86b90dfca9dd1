"""How the slices were cut and windowed that a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ntpseg.utils.checks import check_choice
from ntpseg.utils.files import write_json
from ntpseg.volumes.geometry import AXES, Axis

VOLUME = "volume.json"


@dataclass(frozen=True, slots=True)
class VolumeInput:
    """What a model's training images were, as slices of volumes.

    Attributes:
        axis: "axial", "coronal" or "sagittal"; None where the training data were no slices, or of several axes.
        window: as `ntpseg.volumes.windows.parse_window` reads it, such as "lung" or "-160..240"; None where it is not
            known, or not one.

    Raises:
        ValueError: another axis, or an empty window.
    """

    axis: Axis | None = None
    window: str | None = None

    def __post_init__(self) -> None:
        if self.axis is not None:
            check_choice("axis", self.axis, AXES)
        if self.window is not None and (not isinstance(self.window, str) or not self.window.strip()):
            raise ValueError(f"window must be the text of a window or None, got {self.window!r}")

    def save(self, directory: Path) -> None:
        """Write ``volume.json`` where there is something to remember."""
        if self != VolumeInput():
            write_json(directory / VOLUME, asdict(self))

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], source: object) -> VolumeInput:
        """What `save` wrote; fields that a later version adds are left out.

        Args:
            value: the content of the file.
            source: the file, for messages.

        Raises:
            ValueError: a value that cannot be.
        """
        try:
            return cls(value.get("axis"), value.get("window"))
        except ValueError as error:
            raise ValueError(f"{source} must say how training images were cut, got damage ({error})") from error
