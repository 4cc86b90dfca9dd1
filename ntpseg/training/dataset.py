"""Training pairs from the token cache: one random variant per epoch, padded on the right."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ntpseg.tokenizers.sequence import IGNORE_INDEX

if TYPE_CHECKING:
    from ntpseg.tokenizers.sequence import SequenceFormat


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


class EpochDataset(Dataset, ABC):
    """A data set whose samples depend on seed, epoch and index alone, so that a resumed run sees the same ones.

    Args:
        seed: of everything random.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.epoch = seed, 0

    @abstractmethod
    def __len__(self) -> int: ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0 on."""
        self.epoch = epoch


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
    """

    def __init__(self, sequence: SequenceFormat, *, grid_ids: bool = True) -> None:
        self.sequence, self.grid_ids = sequence, grid_ids

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor | int]:
        """A batch: sample_ids ``[B]``, input_ids, labels and grid_ids ``[B, T]`` (all int64), and loss_start."""
        length = max(len(s["input_ids"]) for s in samples)
        ids = np.full((len(samples), length), self.sequence.vocabulary.pad, np.int64)
        labels = np.full((len(samples), length), IGNORE_INDEX, np.int64)
        for row, sample in enumerate(samples):
            size = len(sample["input_ids"])
            ids[row, :size], labels[row, :size] = sample["input_ids"], sample["labels"]
        batch: dict[str, Tensor | int] = {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "sample_ids": torch.tensor([s["sample_ids"] for s in samples]),
            "loss_start": int((labels != IGNORE_INDEX).any(0).argmax()),
        }
        if self.grid_ids:
            batch["grid_ids"] = torch.from_numpy(self.sequence.grid_ids(ids))
        return batch


class EpochSampler(Sampler[int]):
    """A permutation of the data set that depends on its seed and epoch alone, the same on every rank."""

    def __init__(self, dataset: EpochDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.dataset.seed, self.dataset.epoch))
        return iter(rng.permutation(len(self.dataset)).tolist())
