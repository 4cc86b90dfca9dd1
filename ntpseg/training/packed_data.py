"""A run on a packed data set: it is not checked again, and streamed where it can be."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ntpseg.data.shards import PackedSet, dataset_url, is_packed, open_packed
from ntpseg.tokenizers.auto import load_vision_tokenizer
from ntpseg.tokenizers.packed import PackedPixels, PackedTokens
from ntpseg.tokenizers.text import load_text_tokenizer, text_fingerprint
from ntpseg.tokenizers.vision import VisionTokenizer
from ntpseg.training.config import RunConfig
from ntpseg.training.run_data import RunData, Tokenizers
from ntpseg.training.sampling import write_sampling_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ntpseg.data import Record


def packed_of(config: RunConfig) -> PackedSet | None:
    """The packed set that a run reads; None where its data set is none.

    Raises:
        ValueError: it is not complete.
    """
    path = config.data.path
    if path is None or config.data.layout not in ("auto", "packed"):
        return None
    if dataset_url(path) is None and not Path(path).expanduser().is_dir():
        return None
    if config.data.layout == "auto" and not is_packed(path):
        return None
    return open_packed(path)


class PackedData(RunData):
    """The pairs of a packed set.

    Args:
        config: the run's.
        packed: the set.
    """

    def __init__(self, config: RunConfig, packed: PackedSet) -> None:
        self._config, self._packed = config, packed

    def pairs(self, split: str) -> Sequence[Record]:
        return self._packed.splits.get(split, [])

    def check(self) -> None:
        """Refuse a class of label maps, which packing has settled, and pairs that the run does not keep."""
        data, packed = self._config.data, self._packed
        if data.mask_value:
            raise ValueError(
                f"data.mask_value must be empty for the packed set {packed.root}, whose pairs have named their class "
                f"since they were packed, got {data.mask_value!r}; pack with --mask-value {data.mask_value}"
            )
        empty = sum(s.manifest.empty for name, s in packed.splits.items() if name != "test")
        if empty and not data.keep_empty:
            raise ValueError(
                f"data.keep_empty must be true for {packed.root}, of which {empty} pairs hold no finding, got false; "
                "or pack without --keep-empty"
            )
        if empty:
            print(f"{empty} pairs hold no finding and are kept", file=sys.stderr)

    def tokenizers(self) -> Tokenizers:
        """Those that the set was packed with; None where the run names its own or reads no image tokens."""
        config, packed = self._config, self._packed
        tokens = packed.manifest.tokens
        if tokens is None or config.model.front_end != "codes":
            return None, None
        own = config.text.path is not None, config.vision.get("path") is not None
        if all(own):
            return None, None
        folder = packed.tokenizers()
        if own[1]:
            return load_text_tokenizer(folder / "text"), None
        if (config.data.size, config.data.channels) != (tokens.image_size, tokens.channels):
            raise ValueError(
                f"data.size and data.channels must be {tokens.image_size} and {tokens.channels}, those of the "
                f"tokenizers of {packed.root}, got {config.data.size} and {config.data.channels}; or pack without "
                "--tokenizers"
            )
        print(f"the tokenizers are those of {packed.root}", file=sys.stderr)
        vision = load_vision_tokenizer(folder / "vision")
        return None if own[0] else load_text_tokenizer(folder / "text"), vision

    def streamed(
        self, split: str, vision: VisionTokenizer, text: PreTrainedTokenizerBase
    ) -> PackedPixels | PackedTokens | None:
        """Pixels always; the tokens that are packed where they are those that the run would make."""
        config, found = self._config, self._packed.splits.get(split)
        if found is None:
            return None
        if config.model.front_end != "codes":
            return PackedPixels(found, config.data.size, config.data.channels)
        tokens = self._packed.manifest.tokens
        if tokens is None or (config.data.variants and split == "train"):
            return None
        if (tokens.vision, tokens.text) != (vision.fingerprint(), text_fingerprint(text)):
            return None
        return PackedTokens(found, tokens)

    def texts(self) -> Iterable[str]:
        return self._packed.splits["train"].texts()

    def views(self) -> Iterable[tuple[str, str]]:
        return self._packed.splits["train"].manifest.views

    def write_sampling(self, run: Path) -> None:
        split = self._packed.splits["train"]
        write_sampling_rows(run, split.empty(), split.volumes())


def data_rows(packed: PackedSet) -> list[dict[str, str]]:
    """What ``RUN/data.jsonl`` says of a packed set: a row per split, with the hash of its pairs."""
    return [
        {"split": name, "case": "all", "image": split.key, "mask": "", "text": "", "other": ""}
        for name, split in packed.splits.items()
        if name != "test"
    ]
