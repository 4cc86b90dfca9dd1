"""The model's place among transformers' auto classes, without importing the model before it is asked for."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

MODEL_TYPE = "ntpseg"


class _Registered(dict[Any, Any]):
    """The registered configs of ``CONFIG_MAPPING``, ours among them from the first question about it on."""

    def __contains__(self, key: object) -> bool:
        if key == MODEL_TYPE and not super().__contains__(key):
            importlib.import_module("ntpseg.models.model")  # registers itself
        return super().__contains__(key)


def register_on_demand(configuration_auto: ModuleType) -> None:
    """Lets ``AutoConfig`` and ``AutoModel`` find ``model_type: ntpseg`` after a plain ``import ntpseg``.

    Args:
        configuration_auto: transformers' module of that name, imported.
    """
    mapping = configuration_auto.CONFIG_MAPPING
    if hasattr(mapping, "_extra_content"):
        mapping._extra_content = _Registered(mapping._extra_content)
