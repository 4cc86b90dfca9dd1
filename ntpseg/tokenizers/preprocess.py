"""From records to what a tokenizer reads: images and masks read, resized and augmented by a few threads, in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ntpseg.data.records import check_masks
from ntpseg.data.shards.errors import ShardError
from ntpseg.utils.checks import check_integer
from ntpseg.utils.progress import progress_bar

if TYPE_CHECKING:
    from ntpseg.data import Augmentation, Record

Item = TypeVar("Item")
Result = TypeVar("Result")


class Pair(NamedTuple):
    """A record as the tokenizers read it.

    Attributes:
        image: float32 [C, S, S] in [-1, 1].
        mask: float32 [1, S, S] in {0, 1}.
        text: the sentence.
    """

    image: np.ndarray
    mask: np.ndarray
    text: str


def parallel_map(function: Callable[[Item], Result], items: Iterable[Item], prefetch: int = 64) -> Iterator[Result]:
    """``map(function, items)`` in threads and in order, at most `prefetch` results early; the first error ends it."""
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= prefetch:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def preprocess(record: Record, size: int, channels: int) -> Pair:
    """Read a record's files and bring them to S = `size` pixels a side and C = `channels`."""
    from ntpseg.data import prepare, read_image, read_truth

    assert record.mask is not None
    try:
        image, mask = prepare(read_image(record.image), read_truth(record), size, channels)
    except ShardError:
        raise  # names its file, and stays one line where a loader's worker raises it
    except ValueError as error:
        raise ValueError(f"record {record.case!r} must have readable files, got: {error}") from error
    assert mask is not None
    return Pair(image, mask, record.text)


def augment_pair(pair: Pair, count: int, augmentation: Augmentation | None, seed: Sequence[int]) -> list[Pair]:
    """The pair itself, then `count` augmented ones; variant v depends on the seed and v alone."""
    if augmentation is None:
        return [pair]
    return [pair, *(Pair(*augmentation.apply(*pair, np.random.default_rng([*seed, v]))) for v in range(1, count + 1))]


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
    check_masks(records)
    check_variants(variants, augmentation)
    if limit is not None and len(records) > limit:
        chosen = np.random.default_rng(seed).permutation(len(records))[:limit]
        records = [records[i] for i in sorted(chosen)]

    def load(index: int) -> list[Pair]:
        pair = preprocess(records[index], size, channels)
        return augment_pair(pair, variants, augmentation if variants else None, (seed, index))

    images, masks = [], []
    with progress_bar("reading images", len(records), enabled=progress) as advance:
        for pairs in parallel_map(load, range(len(records))):
            images += [pair.image for pair in pairs]
            masks += [pair.mask for pair in pairs]
            advance(1)
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks))


def check_variants(variants: int, augmentation: Augmentation | None) -> None:
    """Raise a `ValueError` for a negative count, or for variants without an augmentation."""
    check_integer("variants", variants, 0)
    if variants and augmentation is None:
        raise ValueError(f"augmentation must be an Augmentation where variants is {variants}, got None")
