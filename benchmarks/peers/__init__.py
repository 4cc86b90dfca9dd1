"""Adapters to other people's code: how each is called, and why it cannot be where it cannot."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness.comparison import first_line


def import_error(load: str | Callable[[], Any], *, cuda: bool = False) -> str | None:
    """Why a peer cannot be used, in the words of the rows; None where it can be tried.

    Args:
        load: the name of a module to import, or a function that imports what it needs.
        cuda: it needs a CUDA device.
    """
    if cuda and not torch.cuda.is_available():
        return "needs a CUDA device"
    try:
        importlib.import_module(load) if isinstance(load, str) else load()
    except Exception as error:  # a broken installation may raise anything on import
        return f"{type(error).__name__}: {first_line(error)}"
    return None
