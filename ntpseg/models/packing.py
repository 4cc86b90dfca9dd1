"""Packed rows: sequences of any length laid end to end, so that the decoder computes hardly any padding.

Only what the decoder reads is packed. Embeddings go into rows of one length, hidden states come back out of them by
sample, and the loss, with its k heads, negatives and hard error tokens, sees the batch that it sees without packing:
nothing there can cross from one sequence into the next. Within the decoder positions start again with each sequence
and attention stays within it (sample packing, arXiv 2107.02027).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntpseg.utils.checks import check_integer

# Matrix units take rows of a multiple of so many.
_MULTIPLE = 8
# Implementations of this package, which compute each sequence by itself.
BY_BOUNDS = ("causal_blocks", "xformers")


@dataclass(frozen=True)
class PackedRows:
    """Where the tokens of a batch ``[B, T]`` lie in R rows of L tokens.

    What no sequence fills of a row is divided into runs of at most T tokens that are sequences for the attention and
    for nothing else.

    Attributes:
        source: int64 ``[R, L]``, the token that lies there, ``b * T + t``; -1 where a row is not filled.
        position: int64 ``[R, L]``, its place t within its sequence.
        place: int64 ``[B, T]``, where a token lies, ``row * L + column``; what is behind a sequence's end lies where
            its last token does.
        bounds: int32 ``[sequences + 1]``, where each sequence begins in ``R * L`` tokens, and the end.
    """

    source: Tensor
    position: Tensor
    place: Tensor
    bounds: Tensor

    @classmethod
    def plan(cls, lengths: Sequence[int], row_length: int, width: int | None = None) -> PackedRows:
        """As few rows as first-fit decreasing needs, filled evenly and no longer than the fullest of them needs.

        Args:
            lengths: tokens of each sequence, B numbers >= 1.
            row_length: the most tokens of a row; the longest sequence's where that is longer.
            width: T, the longest sequence's by default.

        Raises:
            ValueError: there is no sequence, one has no token or more than `width`, or `row_length` is below 1.
        """
        check_integer("row_length", row_length, 1)
        longest = max(lengths, default=0)
        width = longest if width is None else width
        if not lengths or min(lengths) < 1 or longest > width:
            raise ValueError(f"lengths must be numbers from 1 to {width}, got {list(lengths)}")
        limit = max(row_length, longest)
        rows = _first_fit(lengths, limit)
        even = _spread(lengths, len(rows))
        used, spread = (max(sum(lengths[i] for i in row) for row in choice) for choice in (rows, even))
        if spread < used:
            rows, used = even, spread
        size = min(limit, -(-used // _MULTIPLE) * _MULTIPLE)
        source = np.full((len(rows), size), -1, np.int64)
        position = np.zeros((len(rows), size), np.int64)
        place = np.empty((len(lengths), width), np.int64)
        bounds = [0]
        for row, samples in enumerate(rows):
            column = 0
            for sample in samples:
                length = lengths[sample]
                inside = np.arange(length)
                source[row, column : column + length] = sample * width + inside
                position[row, column : column + length] = inside
                place[sample] = row * size + column + np.minimum(np.arange(width), length - 1)
                column += length
                bounds.append(row * size + column)
            while column < size:
                length = min(width, size - column)
                position[row, column : column + length] = np.arange(length)
                column += length
                bounds.append(row * size + column)
        return cls(*map(torch.from_numpy, (source, position, place, np.array(bounds, np.int32))))

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], batch: int, width: int) -> PackedRows:
        """From `tensors`, the fields by name, of a batch ``[batch, width]``.

        Raises:
            ValueError: it lacks one, or is of another batch.
        """
        missing = [name for name in cls.__dataclass_fields__ if name not in tensors]
        if missing:
            raise ValueError(f"packing must have {', '.join(cls.__dataclass_fields__)}, got none of {missing[0]!r}")
        made = cls(**{name: tensors[name] for name in cls.__dataclass_fields__})
        if list(made.place.shape) != [batch, width]:
            raise ValueError(f"packing must be of a batch [{batch}, {width}], got one of {list(made.place.shape)}")
        return made

    def tensors(self) -> dict[str, Tensor]:
        """The fields by name, as a batch carries them between processes and devices."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @property
    def sample(self) -> Tensor:
        """Int64 ``[R, L]``: the sample b of each token, -1 where a row is not filled."""
        return torch.div(self.source, self.place.shape[1], rounding_mode="floor")

    @property
    def segment(self) -> Tensor:
        """Int64 ``[R, L]``: which of a row's sequences a token belongs to, from 1 on."""
        return (self.position == 0).cumsum(1)

    def pack(self, values: Tensor) -> Tensor:
        """``[B, T, ...]`` as ``[R, L, ...]``; what is not filled repeats the batch's first token."""
        return _gather(values, self.source.clamp_min(0))

    def unpack(self, values: Tensor) -> Tensor:
        """``[R, L, ...]`` as ``[B, T, ...]``; behind a sequence's end its last token is repeated."""
        return _gather(values, self.place)

    def attention_arguments(self) -> dict[str, Any]:
        """What FlashAttention reads of it: Hugging Face's names of the arguments of its variable-length functions."""
        longest = self.place.shape[1]
        return {
            "cu_seq_lens_q": self.bounds,
            "cu_seq_lens_k": self.bounds,
            "max_length_q": longest,
            "max_length_k": longest,
        }


def _first_fit(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """The samples of each row: the longest first, each into the first row that has room."""
    rows: list[list[int]] = []
    used: list[int] = []
    for sample in _longest_first(lengths):
        row = next((i for i, filled in enumerate(used) if filled + lengths[sample] <= limit), len(rows))
        if row == len(rows):
            rows.append([])
            used.append(0)
        rows[row].append(sample)
        used[row] += lengths[sample]
    return rows


def _spread(lengths: Sequence[int], count: int) -> list[list[int]]:
    """The samples of each of `count` rows: the longest first, each into the row that is emptiest."""
    rows: list[list[int]] = [[] for _ in range(count)]
    used = [0] * count
    for sample in _longest_first(lengths):
        row = used.index(min(used))
        rows[row].append(sample)
        used[row] += lengths[sample]
    return rows


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])


def _gather(values: Tensor, index: Tensor) -> Tensor:
    # Backward of an index_select is an index_add, which is much faster than that of indexing.
    return values.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)


def packed_arguments(packed: PackedRows, attention: str, mask: Any) -> dict[str, Any]:
    """What a Hugging Face decoder must be given to attend within the sequences of packed rows.

    Args:
        packed: the rows.
        attention: the decoder's implementation.
        mask: of the packed rows, where they are not plainly causal; None where they are.
    """
    arguments: dict[str, Any] = {"position_ids": packed.position, "attention_mask": mask}
    if "flash" in attention:
        return arguments | packed.attention_arguments()
    if attention not in BY_BOUNDS:
        # transformers sees by the positions where sequences begin, and makes the mask of it.
        return arguments
    if mask is None:
        # A mask of four dimensions is handed on as it is: none need be made where none is read.
        arguments["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=packed.position.device)
    return arguments | {"packed_bounds": packed.bounds.tolist(), "packed_causal": mask is None}
