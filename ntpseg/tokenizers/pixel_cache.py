"""The pixel cache: images and masks at the model's size, for front ends that read pixels and augment as they train."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from ntpseg.data.records import check_masks
from ntpseg.tokenizers.cache_folder import build_cache, check_cache, content_key, damage_named
from ntpseg.tokenizers.preprocess import Pair, parallel_map, preprocess
from ntpseg.utils.progress import progress_bar

if TYPE_CHECKING:
    from ntpseg.data import Record

_VERSION = 1
_TOUCH_EVERY = 1024  # images, see `remove_stale_folders`


class PixelSource(ABC):
    """Pairs as front ends that read pixels get them: a `PixelCache`, or a packed data set as it is.

    Attributes:
        key: of the content; the same pairs in the same order have the same.
    """

    key: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def pair(self, index: int) -> Pair:
        """Image, float32 [C, S, S] in [-1, 1], mask, float32 [1, S, S] in {0, 1}, and sentence of record `index`."""

    def text(self, index: int) -> str:
        """The sentence of record `index`."""
        return self.pair(index).text

    def prefetch(self, indices: Sequence[int]) -> None:  # noqa: B027  # most have nothing to do
        """Told which records will be asked for next."""


@dataclass(frozen=True)
class PixelCache(PixelSource):
    """The images and masks of a data set at one size; created by `build` or `open`.

    Attributes:
        directory: the folder that holds caches.
        key: this cache's folder in it.
        images: uint8 [N, C, S, S], read-only, memory-mapped.
        texts: the sentences.
    """

    directory: Path
    key: str
    images: NDArray[np.uint8]
    texts: list[str] = field(repr=False)
    _masks: NDArray[np.uint8] = field(repr=False)

    def __len__(self) -> int:
        return len(self.images)

    def pair(self, index: int) -> Pair:
        """Image, float32 [C, S, S] in [-1, 1], mask, float32 [1, S, S] in {0, 1}, and sentence of record `index`."""
        image = self.images[index].astype(np.float32) / np.float32(127.5) - np.float32(1)
        size = self.images.shape[-1]
        mask = np.unpackbits(self._masks[index], count=size * size).reshape(1, size, size)
        return Pair(image, mask.astype(np.float32), self.texts[index])

    def __reduce__(self) -> tuple[Any, tuple[Path, str]]:
        # A memory map would be pickled with its content: a data loader's worker opens the file instead, which its
        # parent has checked.
        return PixelCache._read, (self.directory, self.key)

    @classmethod
    def build(
        cls, directory: str | Path, dataset: Sequence[Record], size: int, channels: int, *, progress: bool = True
    ) -> PixelCache:
        """Read and resize the files of `dataset`, or open the cache that holds exactly this already.

        Args:
            directory: where caches are; created if absent.
            dataset: records, each with a mask.
            size: S, pixels of a side.
            channels: C, 1 or 3.
            progress: show a progress bar.

        Raises:
            ValueError: no record, a record without mask, or an unreadable file.
        """
        check_masks(dataset)
        settings = {"kind": "pixels", "version": _VERSION, "size": size, "channels": channels}
        key = content_key(settings, dataset)
        build_cache(Path(directory), key, lambda folder: _write(folder, dataset, size, channels, progress))
        return cls._read(Path(directory), key)

    @classmethod
    def open(cls, directory: str | Path, key: str) -> PixelCache:
        """Open the cache `key` in `directory`.

        Raises:
            ValueError: there is none, or a file of it is not what was written.
        """
        check_cache(Path(directory), key)
        return cls._read(Path(directory), key)

    @classmethod
    def _read(cls, directory: Path, key: str) -> PixelCache:
        path = directory / key
        with damage_named(path):
            images, masks = (np.load(path / f"{name}.npy", mmap_mode="r") for name in ("images", "masks"))
            texts = json.loads((path / "texts.json").read_text(encoding="utf-8"))
        return cls(directory, key, images, texts, masks)


def _write(folder: Path, dataset: Sequence[Record], size: int, channels: int, progress: bool) -> None:
    images = open_memmap(folder / "images.npy", "w+", np.uint8, (len(dataset), channels, size, size))
    masks = open_memmap(folder / "masks.npy", "w+", np.uint8, (len(dataset), -(-size * size // 8)))
    with progress_bar("reading images", len(dataset), enabled=progress) as advance:
        for index, pair in enumerate(parallel_map(lambda record: preprocess(record, size, channels), dataset)):
            images[index] = np.rint((pair.image + 1) * 127.5)
            masks[index] = np.packbits(pair.mask.ravel() > 0)
            if index % _TOUCH_EVERY == 0:
                os.utime(folder)
            advance(1)
    images.flush()
    masks.flush()
    (folder / "texts.json").write_text(json.dumps([r.text for r in dataset], ensure_ascii=False), encoding="utf-8")
