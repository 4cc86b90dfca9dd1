"""Packages of the optional extras: imported where they are first needed, and named where they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str, what: str) -> ModuleType:
    """Import a package that `pip install ntpseg` alone does not bring.

    Args:
        module: dotted name, such as "nibabel".
        extra: extra of this package that brings it, such as "medical".
        what: what the user wanted, such as "reading NIfTI".

    Raises:
        ValueError: it is not installed, or cannot be loaded; one line with the command that installs it.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] != package:
            reason = f"it misses {error.name}"
        else:
            reason = "none"
    except ImportError as error:
        reason = " ".join(str(error).split())
    raise ValueError(
        f'the package {package} must be installed for {what}, got {reason}; run: pip install "ntpseg[{extra}]"'
    )
