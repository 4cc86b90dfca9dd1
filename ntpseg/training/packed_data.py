"""A run on a packed data set: it is not checked again, and streamed where it can be."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ntpseg.data.shards import PackedSet, dataset_url, is_packed, open_packed
from ntpseg.tokenizers.auto import load_vision_tokenizer
from ntpseg.tokenizers.packed import PackedPixels, PackedTokens
from ntpseg.tokenizers.text import load_text_tokenizer, text_fingerprint
from ntpseg.tokenizers.vision import VisionTokenizer
from ntpseg.training.config import RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def packed_of(config: RunConfig) -> PackedSet | None:
    """The packed set that a run reads; None where its data set is none.

    Raises:
        ValueError: it is not complete, or holds cases without a finding, which the run does not keep.
    """
    path = config.data.path
    if path is None or config.data.layout not in ("auto", "packed"):
        return None
    if dataset_url(path) is None and not Path(path).expanduser().is_dir():
        return None
    if config.data.layout == "auto" and not is_packed(path):
        return None
    return open_packed(path)


def check_packed(config: RunConfig, packed: PackedSet) -> None:
    """Refuse a packed set that a run cannot train on.

    Raises:
        ValueError: it has no training pair, cases without a finding, which the run does not keep, or the run names a
            class of label maps, which packing has settled.
    """
    if config.data.mask_value:
        raise ValueError(
            f"data.mask_value must be empty for the packed set {packed.root}, whose pairs have named their class since "
            f"they were packed, got {config.data.mask_value!r}; pack with --mask-value {config.data.mask_value}"
        )
    if "train" not in packed.splits:
        raise ValueError(f"data.path must hold a pair of the training split, got none in {config.data.path!r}")
    empty = sum(s.manifest.empty for name, s in packed.splits.items() if name != "test")
    if empty and not config.data.keep_empty:
        raise ValueError(
            f"data.keep_empty must be true for {packed.root}, of which {empty} pairs hold no finding, got false; or "
            "pack without --keep-empty"
        )
    if empty:
        print(f"{empty} pairs hold no finding and are kept", file=sys.stderr)


def packed_tokenizers(
    config: RunConfig, packed: PackedSet
) -> tuple[PreTrainedTokenizerBase | None, VisionTokenizer | None]:
    """The tokenizers that a set was packed with, each None where the run names its own or reads no image tokens.

    Raises:
        ValueError: the run's images have another size or other channels.
    """
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
            f"data.size and data.channels must be {tokens.image_size} and {tokens.channels}, those of the tokenizers "
            f"of {packed.root}, got {config.data.size} and {config.data.channels}; or pack without --tokenizers"
        )
    print(f"the tokenizers are those of {packed.root}", file=sys.stderr)
    vision = load_vision_tokenizer(folder / "vision")
    return None if own[0] else load_text_tokenizer(folder / "text"), vision


def streamed(
    config: RunConfig,
    packed: PackedSet,
    name: str,
    vision: VisionTokenizer,
    text: PreTrainedTokenizerBase,
) -> PackedPixels | PackedTokens | None:
    """A split as it is streamed; None where its pairs must be tokenised first."""
    split = packed.splits[name]
    if config.model.front_end != "codes":
        return PackedPixels(split, config.data.size, config.data.channels)
    tokens = packed.manifest.tokens
    if tokens is None or (config.data.variants and name == "train"):
        return None
    if (tokens.vision, tokens.text) != (vision.fingerprint(), text_fingerprint(text)):
        return None
    return PackedTokens(split, tokens)


def data_rows(packed: PackedSet) -> list[dict[str, str]]:
    """What ``RUN/data.jsonl`` says of a packed set: a row per split, with the hash of its pairs."""
    return [
        {"split": name, "case": "all", "image": split.key, "mask": "", "text": "", "other": ""}
        for name, split in packed.splits.items()
        if name != "test"
    ]
