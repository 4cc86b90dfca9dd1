"""The causal decoder, its k heads and the saved bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ntpseg.utils.lazy import lazy_exports

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

__getattr__ = lazy_exports(__name__, _EXPORTS)

if TYPE_CHECKING:
    from ntpseg.models.bundle import Bundle as Bundle
    from ntpseg.models.config import NTPSegConfig as NTPSegConfig
    from ntpseg.models.heads import NextKHeads as NextKHeads
    from ntpseg.models.model import NTPSegModel as NTPSegModel
    from ntpseg.models.model import NTPSegOutput as NTPSegOutput
    from ntpseg.models.presets import PRESETS as PRESETS
    from ntpseg.models.presets import preset_config as preset_config
