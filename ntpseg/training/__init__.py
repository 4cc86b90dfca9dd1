"""Training on Hugging Face Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ntpseg.utils.lazy import lazy_exports

_EXPORTS = {
    "RunConfig": "ntpseg.training.config",
    "load_config": "ntpseg.training.config",
    "config_names": "ntpseg.training.config",
    "train": "ntpseg.training.pipeline",
    "NTPSegTrainer": "ntpseg.training.trainer",
    "TokenDataset": "ntpseg.training.dataset",
    "Collator": "ntpseg.training.dataset",
}

__all__ = ["Collator", "NTPSegTrainer", "RunConfig", "TokenDataset", "config_names", "load_config", "train"]

__getattr__ = lazy_exports(__name__, _EXPORTS)

if TYPE_CHECKING:
    from ntpseg.training.config import RunConfig as RunConfig
    from ntpseg.training.config import config_names as config_names
    from ntpseg.training.config import load_config as load_config
    from ntpseg.training.dataset import Collator as Collator
    from ntpseg.training.dataset import TokenDataset as TokenDataset
    from ntpseg.training.pipeline import train as train
    from ntpseg.training.trainer import NTPSegTrainer as NTPSegTrainer
