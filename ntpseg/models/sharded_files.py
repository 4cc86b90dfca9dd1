"""Parts of the weights in a saved model's safetensors files, without reading the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ntpseg.utils.checks import one_line

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class WeightFiles:
    """The weights of a saved model, in one file or in those that an index names.

    Args:
        directory: of the model.

    Attributes:
        shapes: of every weight, by name.

    Raises:
        ValueError: there are no safetensors files, or one is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        names = [_SINGLE]
        try:
            if (directory / _INDEX).is_file():
                index = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
                names = sorted(set(index["weight_map"].values()))
            elif not (directory / _SINGLE).is_file():
                raise ValueError(
                    f"model directory must hold {_SINGLE} or {_INDEX} to be read in shards, got {str(directory)!r}"
                )
            self._file: dict[str, str] = {}
            self.shapes: dict[str, tuple[int, ...]] = {}
            for name in names:
                with safe_open(directory / name, "pt") as file:
                    for key in file.keys():  # noqa: SIM118  # not a mapping
                        self._file[key] = name
                        self.shapes[key] = tuple(file.get_slice(key).get_shape())
        except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise self._damaged(error) from error

    def whole(self, name: str) -> Tensor:
        """All of a weight."""
        return self._read(name, lambda file: file.get_tensor(name).clone())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Entries `start` to `stop` of a weight's first dimension."""
        return self._read(name, lambda file: file.get_slice(name)[start:stop].clone())

    def entries(self, name: str, start: int, stop: int) -> Tensor:
        """Entries `start` to `stop` of a weight, flattened."""
        shape = self.shapes[name]
        if not shape:
            return self.whole(name).flatten()[start:stop]
        width = max(torch.Size(shape[1:]).numel(), 1)
        first = start // width
        rows = self.rows(name, first, max(-(-stop // width), first))
        return rows.flatten()[start - first * width : stop - first * width].clone()

    def _read(self, name: str, read: Any) -> Tensor:
        try:
            # Opened for each weight: what is mapped counts as memory for as long as the file is open.
            with safe_open(self.directory / self._file[name], "pt") as file:
                return read(file)
        except (OSError, SafetensorError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(f"model directory must hold a whole model, got {str(self.directory)!r} ({one_line(error)})")
