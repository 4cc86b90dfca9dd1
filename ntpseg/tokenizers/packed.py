"""A packed data set as training reads it: nothing is copied or held but what was read last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntpseg.data.shards import PackedSplit, TokenLayout
from ntpseg.tokenizers.pixel_cache import PixelSource
from ntpseg.tokenizers.preprocess import Pair, preprocess


class PackedPixels(PixelSource):
    """Pixels of a packed split, decoded and resized when they are asked for: what a `PixelCache` of it would give.

    Args:
        split: the pairs.
        size: S, pixels of a side.
        channels: 1 or 3.
    """

    def __init__(self, split: PackedSplit, size: int, channels: int) -> None:
        self.split, self.size, self.channels = split, size, channels
        self.key = _key(split, {"kind": "pixels", "size": size, "channels": channels})

    def __len__(self) -> int:
        return len(self.split)

    def pair(self, index: int) -> Pair:
        return preprocess(self.split[index], self.size, self.channels)

    def text(self, index: int) -> str:
        return self.split.text(index)

    def prefetch(self, indices: Sequence[int]) -> None:
        self.split.prefetch(indices, ("image", "mask"))


class PackedTokens:
    """Tokens of a packed split; read as a `TokenCache` without variants.

    Args:
        split: the pairs.
        layout: how their tokens are stored.

    Attributes:
        key: of the content.
        image_codes, mask_codes: indexed by ``[record, 0]``, int64 ``[h, w]``.
        variants: 0.
    """

    variants = 0

    def __init__(self, split: PackedSplit, layout: TokenLayout) -> None:
        self.split, self.layout = split, layout
        self.key = _key(split, {"kind": "tokens", "vision": layout.vision, "text": layout.text})
        image, mask = (int(np.prod(grid)) for grid in (layout.image_grid, layout.mask_grid))
        self.image_codes = _Codes(self, layout.image_grid, slice(-image - mask, -mask))
        self.mask_codes = _Codes(self, layout.mask_grid, slice(-mask, None))
        self._text = slice(None, -image - mask)

    def __len__(self) -> int:
        return len(self.split)

    def text_ids(self, index: int, variant: int = 0) -> list[int]:
        """Ids of a sentence, without special tokens."""
        return self.numbers(index)[self._text].tolist()

    def numbers(self, index: int) -> NDArray[Any]:
        """Everything that is stored of a pair."""
        return np.frombuffer(self.split.read(index, "tokens"), self.layout.dtype)

    def prefetch(self, indices: Sequence[int]) -> None:
        """Read the tokens of some pairs in one go."""
        self.split.prefetch(indices, ("tokens",))


class _Codes:
    """One part of all pairs' tokens.

    Args:
        tokens: of all pairs.
        grid: h, w.
        part: of a pair's numbers.
    """

    def __init__(self, tokens: PackedTokens, grid: tuple[int, int], part: slice) -> None:
        self._tokens, self._part = tokens, part
        self.shape = (len(tokens), 1, *grid)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, place: tuple[int, int]) -> NDArray[np.int64]:
        index, variant = place
        if variant:
            raise IndexError(f"variant must be 0, of a packed data set's tokens, got {variant}")
        return self._tokens.numbers(index)[self._part].reshape(self.shape[2:]).astype(np.int64)


def _key(split: PackedSplit, settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([split.key, settings], sort_keys=True).encode()).hexdigest()[:32]
