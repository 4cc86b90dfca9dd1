"""The causal decoder, its k heads and the saved bundle."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "NTPSegConfig": "ntpseg.models.config",
    "NTPSegModel": "ntpseg.models.model",
    "NTPSegOutput": "ntpseg.models.model",
    "NextKHeads": "ntpseg.models.heads",
    "Bundle": "ntpseg.models.bundle",
    "PRESETS": "ntpseg.models.presets",
    "preset_config": "ntpseg.models.presets",
}

__all__ = [
    "PRESETS",
    "Bundle",
    "NTPSegConfig",
    "NTPSegModel",
    "NTPSegOutput",
    "NextKHeads",
    "preset_config",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'ntpseg.models' has no attribute {name!r}")


if TYPE_CHECKING:
    from ntpseg.models.bundle import Bundle as Bundle
    from ntpseg.models.config import NTPSegConfig as NTPSegConfig
    from ntpseg.models.heads import NextKHeads as NextKHeads
    from ntpseg.models.model import NTPSegModel as NTPSegModel
    from ntpseg.models.model import NTPSegOutput as NTPSegOutput
    from ntpseg.models.presets import PRESETS as PRESETS
    from ntpseg.models.presets import preset_config as preset_config
