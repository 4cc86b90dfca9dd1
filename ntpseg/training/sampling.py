"""Which pairs an epoch visits: a bounded share of slices without foreground, and of each volume not too many."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ntpseg.utils.checks import check_integer, check_number
from ntpseg.utils.files import write_json

if TYPE_CHECKING:
    from ntpseg.data import Record

SAMPLING = "sampling.json"


@dataclass(frozen=True)
class SamplingOptions:
    """How an epoch chooses among the training pairs.

    Attributes:
        empty_share: at most this share of the pairs of an epoch has no foreground; None: as they come.
        pairs_per_volume: at most so many pairs of a volume in an epoch; None: all.

    Raises:
        ValueError: the share is not in [0, 1), or the number is below 1.
    """

    empty_share: float | None = None
    pairs_per_volume: int | None = None

    def __post_init__(self) -> None:
        if self.empty_share is not None:
            check_number("data.empty_share", self.empty_share, 0, below=1)
        if self.pairs_per_volume is not None:
            check_integer("data.pairs_per_volume", self.pairs_per_volume, 1)

    def __bool__(self) -> bool:
        return self != SamplingOptions()


class SliceSampling:
    """The pairs of each epoch, which depend on seed and epoch alone: any rank, and a resumed run, sees the same.

    No pair comes twice in an epoch. Every epoch takes the next of the pairs that there is no room for, so that all of
    them come equally often. Pairs with and without foreground alternate evenly, so that a batch has about the share of
    the epoch. A pair without a volume (a 2-D image) is its own.

    Args:
        empty: of each pair, whether its mask has no foreground; bool ``[N]``.
        volumes: of each pair, the name of its volume, "" for a 2-D image; length N.
        options: what an epoch holds.

    Raises:
        ValueError: nothing is left, or pairs per volume are limited and there is no volume.
    """

    def __init__(self, empty: Sequence[bool] | np.ndarray, volumes: Sequence[str], options: SamplingOptions) -> None:
        self.empty, self.options = np.asarray(empty, dtype=bool), options
        if len(volumes) != len(self.empty):
            raise ValueError(f"volumes must have the length of empty, {len(self.empty)}, got {len(volumes)}")
        numbers = {name: number for number, name in enumerate(dict.fromkeys(filter(None, volumes)))}
        self._volume = np.array([numbers.get(name, -1) for name in volumes], dtype=np.int64)
        self.volumes = len(numbers)
        if options.pairs_per_volume is not None and not numbers:
            raise ValueError(
                "data.pairs_per_volume must be null for a data set whose table has no column volume, "
                f"got {options.pairs_per_volume}"
            )
        filled, without = self._chosen(0, 0)
        self.with_foreground, self.without_foreground = len(filled), len(without)
        if not len(self):
            raise ValueError(
                f"data.empty_share must leave a pair to train on, got {options.empty_share} with "
                f"{int(self.empty.sum())} of {len(self.empty)} pairs without foreground"
            )

    def __len__(self) -> int:
        """Pairs of an epoch, the same in each."""
        return self.with_foreground + self.without_foreground

    def __str__(self) -> str:
        total = int(self.empty.sum())
        parts = [
            f"{self.with_foreground} of {len(self.empty) - total} pairs with foreground",
            f"{self.without_foreground} of {total} without",
        ]
        return f"each epoch has {' and '.join(parts)}"

    def order(self, seed: int, epoch: int) -> list[int]:
        """The pairs of an epoch in their order."""
        rng = np.random.default_rng((seed, epoch))
        places, pairs = [], []
        for part in self._chosen(seed, epoch):
            # The n-th of a part somewhere in the n-th of as many stretches of the epoch.
            places.append((np.arange(len(part)) + rng.random(len(part))) / max(len(part), 1))
            pairs.append(rng.permutation(part))
        return np.concatenate(pairs)[np.argsort(np.concatenate(places), kind="stable")].tolist()

    def _chosen(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The pairs of an epoch with and without foreground, each int64."""
        share, most = self.options.empty_share, self.options.pairs_per_volume
        if most is None:
            chosen = np.arange(len(self.empty))
        else:
            parts = [np.flatnonzero(self._volume < 0)]
            parts += [self._of_volume(number, most, share, seed, epoch) for number in range(self.volumes)]
            chosen = np.concatenate(parts)
        filled, without = chosen[~self.empty[chosen]], chosen[self.empty[chosen]]
        if share is not None:
            # The epsilon is for shares such as 0.1, whose quotient may fall just short of a whole number.
            allowed = int(len(filled) * share / (1 - share) + 1e-9)
            without = self._next(np.flatnonzero(self.empty), allowed, seed, epoch, among=without)
        return filled, without

    def _of_volume(self, number: int, most: int, share: float | None, seed: int, epoch: int) -> np.ndarray:
        own = np.flatnonzero(self._volume == number)
        if share is None or len(own) <= most:
            return self._next(own, most, seed, epoch)
        filled, without = own[~self.empty[own]], own[self.empty[own]]
        few = min(int(most * share + 1e-9), len(without))
        return np.concatenate(
            [self._next(filled, most - few, seed, epoch), self._next(without, few, seed, epoch)],
        )

    @staticmethod
    def _next(pairs: np.ndarray, count: int, seed: int, epoch: int, among: np.ndarray | None = None) -> np.ndarray:
        """`count` of the pairs, in each epoch the next in an order that the seed gives; of `among` alone."""
        if not len(pairs):
            return pairs
        order = np.random.default_rng((seed, int(pairs[0]), len(pairs))).permutation(pairs)
        order = np.roll(order, -((epoch * count) % len(pairs)))
        if among is not None:
            order = order[np.isin(order, among)]
        return order[:count]


def write_sampling(run: Path, records: Sequence[Record]) -> None:
    """Write ``RUN/sampling.json``: what is known of the training pairs, in the order of the run's sample ids."""
    from ntpseg.data.checks import map_files
    from ntpseg.data.masks import MIN_PIXELS, mask_content

    contents = map_files(mask_content, (record.mask for record in records if record.mask is not None))

    def is_empty(record: Record) -> bool:
        content = None if record.mask is None else contents[record.mask]
        if content is None or isinstance(content, str):
            raise ValueError(f"mask of case {record.case!r} must be readable, got {content}")
        return content.area(record.mask_value) < MIN_PIXELS

    volumes = [record.place.volume if record.place else "" for record in records]
    write_sampling_rows(run, [is_empty(record) for record in records], volumes)


def write_sampling_rows(run: Path, empty: Sequence[bool] | np.ndarray, volumes: Sequence[str]) -> None:
    """The same of pairs of which it is known already, see `SliceSampling`."""
    write_json(run / SAMPLING, {"empty": [int(value) for value in empty], "volumes": list(volumes)})


def read_sampling(run: Path, pairs: int, options: SamplingOptions) -> SliceSampling:
    """The sampling of a prepared run of so many training pairs.

    Raises:
        ValueError: ``RUN/sampling.json`` is not what `write_sampling` wrote of them, or no pair is left.
    """
    path = run / SAMPLING
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        empty, volumes = [bool(value) for value in content["empty"]], [str(name) for name in content["volumes"]]
        if not len(empty) == len(volumes) == pairs:
            raise ValueError(f"{len(empty)} pairs instead of {pairs}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must say which pairs have no foreground, got a damaged file ({error}); start again with "
            "--overwrite"
        ) from error
    return SliceSampling(empty, volumes, options)
