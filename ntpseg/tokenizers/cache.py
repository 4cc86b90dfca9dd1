"""The token cache: every image and mask is tokenised once, and read through a memory map ever after.

Its key is a hash of everything that its content depends on: pixels and sentences, both tokenizers, the augmentation,
the seed; see `ntpseg.tokenizers.cache_folder`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from ntpseg.data.records import check_masks
from ntpseg.tokenizers.cache_folder import build_cache, check_cache, content_key, damage_named
from ntpseg.tokenizers.preprocess import Pair, augment_pair, check_variants, parallel_map, preprocess
from ntpseg.tokenizers.text import encode_text, text_fingerprint
from ntpseg.tokenizers.vision import VisionTokenizer
from ntpseg.utils.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ntpseg.data import Augmentation, Record

_VERSION = 1
_ARRAYS = ("image_codes", "mask_codes", "text_ids", "text_offsets")
_IMAGES_PER_BATCH = 256


@dataclass(frozen=True)
class TokenCache:
    """The tokens of a data set; created by `build` or `open`.

    Attributes:
        directory: the folder that holds caches.
        key: this cache's folder in it.
        image_codes: unsigned integers [N, 1 + variants, h, w], read-only, memory-mapped; variant 0 is the original.
        mask_codes: the same of the masks.
        texts: the sentence of record n, variant v at ``texts[n][v]`` (a flipped variant's has left and right swapped).
    """

    directory: Path
    key: str
    image_codes: NDArray[Any]
    mask_codes: NDArray[Any]
    texts: list[list[str]] = field(repr=False)
    _text_ids: NDArray[Any] = field(repr=False)
    _text_offsets: NDArray[Any] = field(repr=False)

    def __len__(self) -> int:
        return len(self.image_codes)

    @property
    def variants(self) -> int:
        """Augmented variants of each record."""
        return self.image_codes.shape[1] - 1

    def text_ids(self, index: int, variant: int = 0) -> list[int]:
        """Ids of a sentence, without special tokens."""
        row = index * (1 + self.variants) + variant
        return self._text_ids[self._text_offsets[row] : self._text_offsets[row + 1]].tolist()

    def prefetch(self, indices: Sequence[int]) -> None:
        """Nothing: the system reads a memory map ahead."""

    def __reduce__(self) -> tuple[Any, tuple[Path, str]]:
        # A memory map would be pickled with its content: a data loader's worker opens the file instead, which its
        # parent has checked.
        return TokenCache._read, (self.directory, self.key)

    @classmethod
    def build(
        cls,
        directory: str | Path,
        dataset: Sequence[Record],
        vision: VisionTokenizer,
        text: PreTrainedTokenizerBase,
        *,
        variants: int = 0,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> TokenCache:
        """Tokenise `dataset`, or open the cache that holds exactly this already.

        Several processes may build the same cache at once: one of them wins, all get the same content.

        Args:
            directory: where caches are; created if absent.
            dataset: records, each with a mask.
            vision: the vision tokenizer; images are prepared at its size and channels.
            text: the text tokenizer.
            variants: augmented copies of each record, besides the original.
            augmentation: how they differ; needed when `variants` is not 0.
            seed: of the augmentation.
            progress: show a progress bar.

        Raises:
            ValueError: no record, a record without mask, an unreadable file, or variants without augmentation.
        """
        check_masks(dataset)
        check_variants(variants, augmentation)
        if not variants:
            augmentation = None
        key = cache_key(dataset, vision, text, variants=variants, augmentation=augmentation, seed=seed)
        build_cache(
            Path(directory),
            key,
            lambda folder: _write(folder, dataset, vision, text, variants, augmentation, seed, progress),
        )
        return cls._read(Path(directory), key)

    @classmethod
    def open(cls, directory: str | Path, key: str) -> TokenCache:
        """Open the cache `key` in `directory`.

        Raises:
            ValueError: there is none, or a file of it is not what was written.
        """
        check_cache(Path(directory), key)
        return cls._read(Path(directory), key)

    @classmethod
    def _read(cls, directory: Path, key: str) -> TokenCache:
        path = directory / key
        with damage_named(path):
            image, mask, ids, offsets = (np.load(path / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)
            texts = json.loads((path / "texts.json").read_text(encoding="utf-8"))
        return cls(directory, key, image, mask, texts, ids, offsets)


def cache_key(
    dataset: Sequence[Record],
    vision: VisionTokenizer,
    text: PreTrainedTokenizerBase,
    *,
    variants: int = 0,
    augmentation: Augmentation | None = None,
    seed: int = 0,
) -> str:
    """Hash of all that a cache depends on: file contents and sentences in order, tokenizers, augmentation, seed.

    Names and folders of the files do not count, and without variants neither do augmentation and seed.
    """
    settings: dict[str, Any] = {
        "version": _VERSION,
        "vision": vision.fingerprint(),
        "size": [vision.image_size, vision.channels],
        "text": text_fingerprint(text),
        "variants": variants,
    }
    if variants:
        settings["augmentation"] = asdict(augmentation) if augmentation else None
        settings["seed"] = seed
    return content_key(settings, dataset)


def _code_type(codes: int) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if codes <= 2**16 else np.uint32


def _write(
    path: Path,
    dataset: Sequence[Record],
    vision: VisionTokenizer,
    text: PreTrainedTokenizerBase,
    variants: int,
    augmentation: Augmentation | None,
    seed: int,
    progress: bool,
) -> None:
    """Fill the empty folder `path`."""
    each = 1 + variants
    shapes = {
        "image_codes": (_code_type(vision.image_codes), vision.image_grid),
        "mask_codes": (_code_type(vision.mask_codes), vision.mask_grid),
    }
    arrays = {
        name: open_memmap(path / f"{name}.npy", "w+", dtype, (len(dataset), each, *grid))
        for name, (dtype, grid) in shapes.items()
    }
    texts: list[list[str]] = []

    def load(index: int) -> list[Pair]:
        pair = preprocess(dataset[index], vision.image_size, vision.channels)
        return augment_pair(pair, variants, augmentation, (seed, index))

    def encode(batch: list[list[Pair]], start: int) -> None:
        flat = [pair for pairs in batch for pair in pairs]
        images = torch.from_numpy(np.stack([pair.image for pair in flat]))
        masks = torch.from_numpy(np.stack([pair.mask for pair in flat]))
        codes = {"image_codes": vision.encode_image(images), "mask_codes": vision.encode_mask(masks)}
        for name, array in arrays.items():
            array[start : start + len(batch)] = codes[name].cpu().numpy().reshape(len(batch), *array.shape[1:])
        texts.extend([pair.text for pair in pairs] for pairs in batch)

    batch: list[list[Pair]] = []
    batch_size = max(1, _IMAGES_PER_BATCH // each)
    with progress_bar("tokenising", len(dataset), enabled=progress) as advance:
        for number, pairs in enumerate(parallel_map(load, range(len(dataset)), prefetch=2 * batch_size), start=1):
            batch.append(pairs)
            if len(batch) == batch_size or number == len(dataset):
                encode(batch, number - len(batch))
                os.utime(path)  # in use, see `remove_stale_folders`
                advance(len(batch))
                batch = []
    for array in arrays.values():
        array.flush()
    ids = {sentence: encode_text(text, sentence) for row in texts for sentence in row}
    rows = [ids[sentence] for row in texts for sentence in row]
    np.save(path / "text_ids.npy", np.array([i for row in rows for i in row], dtype=np.uint32))
    np.save(path / "text_offsets.npy", np.cumsum([0, *map(len, rows)], dtype=np.int64))
    (path / "texts.json").write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
