"""What preparing a run asks its data set for, whether that is a folder or packed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ntpseg.data import Record
    from ntpseg.tokenizers.packed import PackedPixels, PackedTokens
    from ntpseg.tokenizers.vision import VisionTokenizer

Tokenizers = tuple["PreTrainedTokenizerBase | None", "VisionTokenizer | None"]


class RunData(ABC):
    """The pairs of a run."""

    @abstractmethod
    def pairs(self, split: str) -> Sequence[Record]:
        """Those of "train" or "val", in the order of the run's sample ids; empty where there are none.

        Raises:
            ValueError: the data set is not in order.
        """

    def check(self) -> None:  # noqa: B027  # reading the pairs may have checked all
        """Refuse what the run cannot train on, before anything is made of it.

        Raises:
            ValueError: a setting of the run does not fit the data set.
        """

    def tokenizers(self) -> Tokenizers:
        """The text and the vision tokenizer that come with the data set and the run has to use, each None without one.

        Raises:
            ValueError: they do not fit the run.
        """
        return None, None

    def streamed(
        self, split: str, vision: VisionTokenizer, text: PreTrainedTokenizerBase
    ) -> PackedPixels | PackedTokens | None:
        """A split as training reads it without a cache; None where a cache must be built of its pairs."""
        return None

    @abstractmethod
    def texts(self) -> Iterable[str]:
        """The sentences of the training pairs."""

    @abstractmethod
    def views(self) -> Iterable[tuple[str, str]]:
        """Axis and window of the training pairs, "" where one is unknown; those that are alike may come once."""

    @abstractmethod
    def write_sampling(self, run: Path) -> None:
        """Write what epochs are drawn by, see `ntpseg.training.sampling`."""
