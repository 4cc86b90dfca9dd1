"""Medical referring image segmentation by next-token prediction.

`ntp_loss` is the drop-in loss; `ntpseg --help` is the program. Names are imported on first use, so that
``import ntpseg`` stays quick and needs neither transformers nor a GPU.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from ntpseg.utils.after_import import after_import
from ntpseg.utils.lazy import lazy_exports

__version__ = "0.2.0"

_EXPORTS = {
    "ntp_loss": "ntpseg.losses",
    "NTPLoss": "ntpseg.losses",
    "NTPOutput": "ntpseg.losses",
    "NumItems": "ntpseg.losses",
    "HardTokens": "ntpseg.memory",
    "HardTokenMemory": "ntpseg.memory",
    "NextKHeads": "ntpseg.models.heads",
    "ops": "ntpseg.ops",
}

__all__ = [
    "HardTokenMemory",
    "HardTokens",
    "NTPLoss",
    "NTPOutput",
    "NextKHeads",
    "NumItems",
    "__version__",
    "ntp_loss",
    "ops",
]


__getattr__ = lazy_exports(__name__, _EXPORTS)


def _register(configuration_auto: ModuleType) -> None:
    from ntpseg.models.auto import register_on_demand

    register_on_demand(configuration_auto)


after_import("transformers.models.auto.configuration_auto", _register)


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from ntpseg import ops as ops
    from ntpseg.losses import NTPLoss as NTPLoss
    from ntpseg.losses import NTPOutput as NTPOutput
    from ntpseg.losses import NumItems as NumItems
    from ntpseg.losses import ntp_loss as ntp_loss
    from ntpseg.memory import HardTokenMemory as HardTokenMemory
    from ntpseg.memory import HardTokens as HardTokens
    from ntpseg.models.heads import NextKHeads as NextKHeads
