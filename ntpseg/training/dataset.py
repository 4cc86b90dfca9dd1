"""Training pairs from the token cache: one random variant per epoch, padded on the right."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ntpseg.models.packing import PackedRows
from ntpseg.tokenizers.sequence import IGNORE_INDEX

if TYPE_CHECKING:
    from ntpseg.tokenizers.sequence import SequenceFormat
    from ntpseg.training.sampling import SliceSampling


# Gathering and attending by sequence take time of their own.
_WORTH_PACKING = 0.95


class CodeSource(Protocol):
    """The part of a `TokenCache` that is read here."""

    @property
    def image_codes(self) -> Any:
        """``[N, 1 + variants, h, w]``."""

    @property
    def mask_codes(self) -> Any:
        """``[N, 1 + variants, h, w]``."""

    def text_ids(self, index: int, variant: int = 0) -> list[int]:
        """Ids of a sentence, without special tokens."""

    def prefetch(self, indices: Sequence[int]) -> None:
        """Told which records will be asked for next."""


class SampleIndex(int):
    """The index of a sample, with what a data set in another process cannot know.

    Attributes:
        epoch: for which it is drawn.
        padding: the sample only fills up a batch of a rank, and must count nothing.
    """

    epoch: int
    padding: bool

    def __new__(cls, value: int, epoch: int = 0, padding: bool = False) -> SampleIndex:
        made = super().__new__(cls, value)
        made.epoch, made.padding = epoch, padding
        return made


class EpochDataset(Dataset, ABC):
    """A data set whose samples depend on seed, epoch and index alone, so that a resumed run sees the same ones.

    A sample is a dict with "sample_ids", its index; of padding (`SampleIndex`) that is ``-1 - index``.

    Args:
        seed: of everything random.

    Attributes:
        sampling: which samples a training epoch visits; None: each of them once.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.epoch = seed, 0
        self.sampling: SliceSampling | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0 on."""
        self.epoch = epoch

    def prefetch(self, indices: Sequence[int]) -> None:  # most have nothing to do
        """Told which samples will be asked for next."""

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The samples of a batch; this is what a ``DataLoader`` calls."""
        self.prefetch([int(index) for index in indices])
        samples = []
        for index in indices:
            # Workers that outlive an epoch hold a copy of the data set, which nothing else tells of the next one.
            if isinstance(index, SampleIndex) and index.epoch != self.epoch:
                self.set_epoch(index.epoch)
            sample = self[int(index)]
            if isinstance(index, SampleIndex) and index.padding:
                sample = {**sample, "sample_ids": -1 - int(index)}
            samples.append(sample)
        return samples


class TokenDataset(EpochDataset):
    """Sequences of a token cache; each epoch draws one of a pair's variants.

    Hard error tokens are remembered per pair, whatever its variant.

    Args:
        cache: the codes and sentences.
        sequence: the sequence format.
        seed: of the choice of variants.
        augmented: draw among the variants; False always gives the original (validation).
        mask_noise: largest fraction of a sequence's mask tokens that is replaced by random codes in the input.
    """

    def __init__(
        self,
        cache: CodeSource,
        sequence: SequenceFormat,
        *,
        seed: int = 0,
        augmented: bool = True,
        mask_noise: float = 0.0,
    ) -> None:
        super().__init__(seed)
        self.cache, self.sequence, self.augmented = cache, sequence, augmented
        self.mask_noise = mask_noise if augmented else 0.0

    def __len__(self) -> int:
        return len(self.cache.image_codes)

    def prefetch(self, indices: Sequence[int]) -> None:
        self.cache.prefetch(indices)

    def variant(self, index: int) -> int:
        """The variant of pair `index` in this epoch; 0 is the original."""
        variants = self.cache.image_codes.shape[1]
        if not self.augmented or variants == 1:
            return 0
        return int(np.random.default_rng((self.seed, self.epoch, index)).integers(variants))

    def __getitem__(self, index: int) -> dict[str, Any]:
        variant = self.variant(index)
        ids, labels = self.sequence.build(
            self.cache.text_ids(index, variant),
            self.cache.image_codes[index, variant],
            self.cache.mask_codes[index, variant],
        )
        if self.mask_noise:
            ids = self._add_noise(ids, labels, index)
        return {"sample_ids": index, "input_ids": ids, "labels": labels}

    def _add_noise(self, ids: np.ndarray, labels: np.ndarray, index: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, self.epoch, index, 1))
        low, high = self.sequence.vocabulary.mask_range
        # Codes alone, since row ends and EOM, which decoding forces, are always read as they are.
        codes = (labels >= low) & (labels < high)
        replaced = codes & (rng.random(len(ids)) < rng.uniform(0.0, self.mask_noise))
        return np.where(replaced, rng.integers(low, high, len(ids)), ids)


class Collator:
    """Pads sequences on the right and adds what the model reads besides ids.

    Causal attention never looks at the padding behind a sequence and its labels are -100, so there is no mask.

    Args:
        sequence: the sequence format.
        grid_ids: add the grid cell of every token.
        packing: most tokens of the rows that the decoder reads instead, see `PackedRows`, of batches in which that
            saves at least 5 % of the tokens; None: a row per sequence.
    """

    def __init__(self, sequence: SequenceFormat, *, grid_ids: bool = True, packing: int | None = None) -> None:
        self.sequence, self.grid_ids, self.packing = sequence, grid_ids, packing

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch: sample_ids ``[B]``, input_ids, labels and grid_ids ``[B, T]`` (all int64), loss_start and, where it
        is packed, ``packing`` (`PackedRows.tensors`).
        """
        lengths = [len(s["input_ids"]) for s in samples]
        length = max(lengths)
        ids = np.full((len(samples), length), self.sequence.vocabulary.pad, np.int64)
        labels = np.full((len(samples), length), IGNORE_INDEX, np.int64)
        for row, sample in enumerate(samples):
            size = len(sample["input_ids"])
            ids[row, :size], labels[row, :size] = sample["input_ids"], sample["labels"]
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "sample_ids": torch.tensor([s["sample_ids"] for s in samples]),
            "loss_start": int((labels != IGNORE_INDEX).any(0).argmax()),
        }
        if self.grid_ids:
            batch["grid_ids"] = torch.from_numpy(self.sequence.grid_ids(ids))
        if self.packing is not None:
            rows = PackedRows.plan(lengths, self.packing)
            if rows.source.numel() <= _WORTH_PACKING * ids.size:
                batch["packing"] = rows.tensors()
        return batch


class EpochSampler(Sampler[int]):
    """A permutation of the data set that depends on its seed and epoch alone, the same on every rank.

    Of a data set with a `sampling`, the samples that this chooses for the epoch.

    Args:
        dataset: the data set.
        multiple: the permutation is filled up to a multiple of this with padding, see `SampleIndex`. With the number of
            samples in a batch of all ranks no rank has to repeat a sample, which would count twice.
        shuffle: False: in order, for evaluation.
        copies, batch_size: each batch of so many samples comes so many times, for ranks that share its sequences.
    """

    def __init__(
        self, dataset: EpochDataset, multiple: int = 1, *, shuffle: bool = True, copies: int = 1, batch_size: int = 1
    ) -> None:
        self.dataset, self.multiple, self.shuffle = dataset, multiple, shuffle
        self.copies, self.batch_size = copies, batch_size

    def __len__(self) -> int:
        return self._samples() * self.copies

    def _samples(self) -> int:
        return -(-self._size() // self.multiple) * self.multiple

    def _size(self) -> int:
        sampling = self.dataset.sampling if self.shuffle else None
        return len(self.dataset) if sampling is None else len(sampling)

    def __iter__(self) -> Iterator[int]:
        epoch, size = self.dataset.epoch, self._size()
        order: Sequence[int] = range(size)
        if self.shuffle and self.dataset.sampling is not None:
            order = self.dataset.sampling.order(self.dataset.seed, epoch)
        elif self.shuffle:
            order = np.random.default_rng((self.dataset.seed, epoch)).permutation(size).tolist()
        places = enumerate(islice(cycle(order), self._samples()))
        samples = (SampleIndex(index, epoch, padding=place >= size) for place, index in places)
        if self.copies == 1:
            return samples
        batches = iter(lambda: list(islice(samples, self.batch_size)), [])
        return (sample for batch in batches for _ in range(self.copies) for sample in batch)


def ignore_padding(batch: dict[str, Any]) -> None:
    """Take away the labels of a batch's padding, and give it the ids of the samples that it repeats; in place."""
    padding = batch["sample_ids"] < 0
    batch["labels"] = batch["labels"].masked_fill(padding[:, None], IGNORE_INDEX)
    batch["sample_ids"] = torch.where(padding, -1 - batch["sample_ids"], batch["sample_ids"])
