"""Records read, prepared and augmented by a few threads, in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from ntpseg.utils.progress import progress_bar

if TYPE_CHECKING:
    from ntpseg.data import Augmentation, Record

Item = TypeVar("Item")
Result = TypeVar("Result")
Pair = tuple[np.ndarray, np.ndarray, str]


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], ahead: int = 64) -> Iterator[Result]:
    """``map(function, items)`` in threads, at most `ahead` results early; the first error ends it."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def require_masks(records: Sequence[Record]) -> None:
    """Raise a `ValueError` if there is no record, or one without a mask."""
    if not records:
        raise ValueError("records is empty; it must hold at least one image with its mask")
    without = [r.case for r in records if r.mask is None]
    if without:
        raise ValueError(f"{len(without)} records have no mask ({', '.join(without[:3])} ...); every one must have one")


def prepared(record: Record, size: int, channels: int) -> Pair:
    """The record as the tokenizer takes it: float32 [C, S, S] in [-1, 1], float32 [1, S, S] in {0, 1}, the text."""
    from ntpseg.data import prepare, read_image, read_mask

    assert record.mask is not None
    try:
        image, mask = prepare(read_image(record.image), read_mask(record.mask), size, channels)
    except ValueError as error:
        raise ValueError(f"record {record.case!r}: {error}") from error
    assert mask is not None
    return image, mask, record.text


def variants_of(pair: Pair, count: int, augmentation: Augmentation | None, seed: Sequence[int]) -> list[Pair]:
    """The pair itself, then `count` augmented ones; variant v depends on the seed and v alone."""
    if augmentation is None:
        return [pair]
    return [pair, *(augmentation.apply(*pair, np.random.default_rng([*seed, v])) for v in range(1, count + 1))]


def stack_pairs(
    records: Sequence[Record],
    size: int,
    channels: int,
    *,
    limit: int | None = None,
    variants: int = 0,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Images and masks of `records` as tensors, what `train_compact_vq` takes.

    Args:
        records: each with a mask.
        size: S, pixels of a side.
        channels: 1 or 3.
        limit: at most this many records, drawn by `seed`.
        variants: augmented copies of each; a codebook that will encode augmented images should have seen some.
        augmentation: how copies differ; needed when `variants` is not 0.
        seed: of the draw and the augmentation.
        progress: show a progress bar.

    Returns:
        float32 [N, C, S, S] in [-1, 1] and float32 [N, 1, S, S] in {0, 1}, N = records * (1 + variants).

    Raises:
        ValueError: no record, a record without mask, an unreadable file, or variants without augmentation.
    """
    require_masks(records)
    check_variants(variants, augmentation)
    if limit is not None and len(records) > limit:
        chosen = np.random.default_rng(seed).permutation(len(records))[:limit]
        records = [records[i] for i in sorted(chosen)]

    def load(index: int) -> list[Pair]:
        pair = prepared(records[index], size, channels)
        return variants_of(pair, variants, augmentation if variants else None, (seed, index))

    images, masks = [], []
    with progress_bar("reading images", len(records), enabled=progress) as advance:
        for pairs in in_threads(load, range(len(records))):
            images += [image for image, _, _ in pairs]
            masks += [mask for _, mask, _ in pairs]
            advance(1)
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks))


def check_variants(variants: int, augmentation: Augmentation | None) -> None:
    """Raise a `ValueError` for a negative count, or for variants without an augmentation."""
    if variants < 0:
        raise ValueError(f"variants is {variants}; it must not be negative")
    if variants and augmentation is None:
        raise ValueError(f"variants is {variants} and augmentation None; variants need an Augmentation")
