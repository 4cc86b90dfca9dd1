"""How text, image codes and mask codes become one sequence, and how a mask is read back from it.

Layout ``ntpseg``: ``BOS text BOI image EOI BOM | mask EOM``, codes row-major; the bar is where the prompt ends and the
target begins. Layout ``emu3`` writes an image as Emu3 does: ``start H*W image-token``, each row followed by a row end,
then frame end and image end; the mask is a second image. Mask codes and EOM are supervised; row ends and the frame end
are forced while decoding, so there is nothing to learn about them. Without an image grid, for a model that reads the
image by features, the prompt of layout ``ntpseg`` is ``BOS text BOM``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ntpseg.tokenizers.vocabulary import SEQUENCE_LAYOUTS, SequenceLayout, Vocabulary

IGNORE_INDEX = -100
Ids = NDArray[np.int64]


class _Encodes(Protocol):
    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...


@dataclass(frozen=True)
class SequenceFormat:
    """The sequence of one sample.

    Attributes:
        vocabulary: the ids.
        image_grid: rows and columns of the image codes; None where the image is not read as tokens (``ntpseg`` alone).
        mask_grid: rows and columns of the mask codes.
        layout: ``ntpseg`` or ``emu3``; it must be the vocabulary's (and is taken from it when left out).
        image_size_ids, mask_size_ids: text ids of ``"H*W"`` (in codes); needed by layout ``emu3``, see `for_tokenizer`.

    Raises:
        ValueError: a grid without cells, or a layout that is not the vocabulary's.
    """

    vocabulary: Vocabulary
    image_grid: tuple[int, int] | None
    mask_grid: tuple[int, int]
    layout: SequenceLayout | None = None
    image_size_ids: tuple[int, ...] = ()
    mask_size_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.layout is None:
            object.__setattr__(self, "layout", self.vocabulary.layout)
        if self.layout != self.vocabulary.layout:
            raise ValueError(
                f"layout must be the vocabulary's layout, {self.vocabulary.layout!r} "
                f"(one of {', '.join(SEQUENCE_LAYOUTS)}), got {self.layout!r}"
            )
        if self.image_grid is None and self.layout == "emu3":
            raise ValueError("image_grid must be given in layout 'emu3', got None")
        for name in ("image_grid", "mask_grid") if self.image_grid is not None else ("mask_grid",):
            grid = tuple(int(n) for n in getattr(self, name))
            if len(grid) != 2 or min(grid) < 1:
                raise ValueError(f"{name} must be two numbers >= 1, rows and columns, got {grid}")
            object.__setattr__(self, name, grid)
        for name in ("image_size_ids", "mask_size_ids"):
            object.__setattr__(self, name, tuple(int(n) for n in getattr(self, name)))
            if bool(getattr(self, name)) != (self.layout == "emu3"):
                raise ValueError(
                    f"{name} must be the text ids of the grid's size in layout 'emu3' (SequenceFormat.for_tokenizer "
                    f"fills them in) and empty in layout 'ntpseg', got {getattr(self, name)}"
                )

    @classmethod
    def for_tokenizer(
        cls, vocabulary: Vocabulary, image_grid: tuple[int, int] | None, mask_grid: tuple[int, int], text: _Encodes
    ) -> SequenceFormat:
        """The format for a text tokenizer: layout ``emu3`` spells each grid's size with it."""
        if vocabulary.layout == "ntpseg" or image_grid is None:
            return cls(vocabulary, image_grid, mask_grid)
        spell = [tuple(text.encode(f"{h}*{w}", add_special_tokens=False)) for h, w in (image_grid, mask_grid)]
        return cls(vocabulary, image_grid, mask_grid, "emu3", *spell)

    @property
    def image_cells(self) -> int:
        """Number of image codes."""
        return 0 if self.image_grid is None else self.image_grid[0] * self.image_grid[1]

    @property
    def mask_cells(self) -> int:
        """Number of mask codes."""
        return self.mask_grid[0] * self.mask_grid[1]

    @property
    def grid_positions(self) -> int:
        """Number of grid cells: `grid_ids` gives 0 .. grid_positions."""
        return self.image_cells + self.mask_cells

    @cached_property
    def _forced(self) -> Ids:
        """Int64 [num_target]: the id forced at each target index, -1 where a mask code is free."""
        h, w = self.mask_grid
        if self.layout == "ntpseg":
            return np.append(np.full(h * w, -1, np.int64), self.vocabulary.eom)
        rows = np.full((h, w + 1), -1, np.int64)
        rows[:, w] = self.vocabulary.row_end
        return np.concatenate([rows.ravel(), [self.vocabulary.frame_end, self.vocabulary.eom]])

    @property
    def num_target(self) -> int:
        """Number of target tokens: mask codes, EOM and, in layout ``emu3``, row ends and the frame end."""
        return len(self._forced)

    def forced(self, index: int) -> int | None:
        """The id forced at target index 0 .. num_target - 1, or None where a mask code is free."""
        if not 0 <= index < self.num_target:
            raise ValueError(f"index must be within [0, {self.num_target}), got {index}")
        token = int(self._forced[index])
        return None if token < 0 else token

    @cached_property
    def target_grid_ids(self) -> Ids:
        """Int64 [num_target]: what `grid_ids` gives for the target's tokens, for decoding one token at a time."""
        free = self._forced < 0
        return np.where(free, self.image_cells + np.cumsum(free), 0)

    def _codes(self, codes: ArrayLike | None, kind: str) -> Ids:
        grid: tuple[int, int] = getattr(self, f"{kind}_grid")
        size: int = getattr(self.vocabulary, f"{kind}_codes")
        array: NDArray[Any] = np.asarray(codes)
        if array.shape != grid or array.dtype.kind not in "iu":
            raise ValueError(f"{kind}_codes must be integers {list(grid)}, got {array.dtype} {list(array.shape)}")
        array = array.astype(np.int64)
        if array.min() < 0 or array.max() >= size:
            raise ValueError(f"{kind}_codes must be within [0, {size}), got values from {array.min()} to {array.max()}")
        return array

    def prompt(self, text_ids: list[int], image_codes: ArrayLike | None = None) -> Ids:
        """Int64 [P]: everything before the first mask token.

        Args:
            text_ids: ids of the text tokenizer, in ``[0, text_size)``, without special tokens; may be empty.
            image_codes: integers [h, w] in ``[0, vocabulary.image_codes)``; ignored without an image grid.

        Raises:
            ValueError: a text id or image code out of range, or a wrong grid.
        """
        v = self.vocabulary
        text = np.asarray(text_ids, dtype=np.int64).reshape(-1)
        if text.size and (text.min() < 0 or text.max() >= v.text_size):
            raise ValueError(
                f"text_ids must be within [0, {v.text_size}), got values from {text.min()} to {text.max()}"
            )
        if self.image_grid is None:
            return np.concatenate([[v.bos], text, [v.bom]]).astype(np.int64)
        image = self._codes(image_codes, "image") + v.image_range[0]
        if self.layout == "ntpseg":
            parts: list[Any] = [[v.bos], text, [v.boi], image.ravel(), [v.eoi, v.bom]]
        else:
            rows = np.pad(image, ((0, 0), (0, 1)), constant_values=v.row_end).ravel()
            parts = [[v.bos], text, [v.boi], self.image_size_ids, [v.image_token], rows, [v.frame_end, v.eoi]]
            parts += [[v.bom], self.mask_size_ids, [v.image_token]]
        return np.concatenate([np.asarray(p, dtype=np.int64) for p in parts])

    def target(self, mask_codes: ArrayLike) -> Ids:
        """Int64 [num_target] of mask codes, integers [h, w]: the ids that follow the prompt, EOM last."""
        out = self._forced.copy()
        out[out < 0] = self._codes(mask_codes, "mask").ravel() + self.vocabulary.mask_range[0]
        return out

    def build(self, text_ids: list[int], image_codes: ArrayLike | None, mask_codes: ArrayLike) -> tuple[Ids, Ids]:
        """Input ids and unshifted labels, both int64 [T]; labels are -100 but at mask codes and EOM."""
        prompt, target = self.prompt(text_ids, image_codes), self.target(mask_codes)
        supervised = (self._forced < 0) | (self._forced == self.vocabulary.eom)
        labels = np.concatenate([np.full_like(prompt, IGNORE_INDEX), np.where(supervised, target, IGNORE_INDEX)])
        return np.concatenate([prompt, target]), labels

    def grid_ids(self, input_ids: ArrayLike) -> Ids:
        """The grid cell of every token, int64 of the shape of `input_ids`, [T] or [B, T] (padding on either side).

        0 is no cell; ``1 + row * w + column`` an image code, ``1 + h * w + row * w' + column`` a mask code. Each row of
        `input_ids` is one sequence, or its beginning.

        Raises:
            ValueError: a row holds more codes than the two grids have cells.
        """
        ids = np.asarray(input_ids)
        lo, hi = self.vocabulary.image_range[0], self.vocabulary.mask_range[1]
        cell = (ids >= lo) & (ids < hi)
        order = np.cumsum(cell, axis=-1, dtype=np.int64)
        if order.size and order.max() > self.grid_positions:
            raise ValueError(
                f"input_ids must hold at most {self.grid_positions} codes in a row (image grid {self.image_grid}, "
                f"mask grid {self.mask_grid}), got {order.max()}"
            )
        return np.where(cell, order, 0)

    def parse(self, target_ids: ArrayLike) -> Ids:
        """Mask codes, int64 [h, w], of target ids [num_target]; forced tokens are dropped, whatever they are.

        Raises:
            ValueError: a wrong length, or an id at a free index that is no mask code.
        """
        ids = np.asarray(target_ids, dtype=np.int64)
        if ids.shape != (self.num_target,):
            raise ValueError(f"target_ids must be [{self.num_target}], got {list(ids.shape)}")
        codes = ids[self._forced < 0] - self.vocabulary.mask_range[0]
        if codes.min() < 0 or codes.max() >= self.vocabulary.mask_codes:
            bad = ids[self._forced < 0][(codes < 0) | (codes >= self.vocabulary.mask_codes)][0]
            lo, hi = self.vocabulary.mask_range
            raise ValueError(f"target_ids must be within [{lo}, {hi}) where a mask code is expected, got {bad}")
        return codes.reshape(self.mask_grid)

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return {
            "vocabulary": self.vocabulary.to_dict(),
            "image_grid": None if self.image_grid is None else list(self.image_grid),
            "mask_grid": list(self.mask_grid),
            "layout": self.layout,
            "image_size_ids": list(self.image_size_ids),
            "mask_size_ids": list(self.mask_size_ids),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SequenceFormat:
        """The inverse of `to_dict`."""
        return cls(**{**data, "vocabulary": Vocabulary.from_dict(data["vocabulary"])})
