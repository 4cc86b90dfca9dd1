"""How many rows share one block of E, from a byte budget, and how the weight's gradient is summed over the chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

WORKSPACE_BYTES = 1 << 30
LEAST_ROWS = 2048
# The sum beside a 16-bit gradient moves 6 bytes per entry and chunk, the fp32 sum 8: at 3/4 of the rows as much.
LEAST_ROWS_BESIDE = 1536
# A product that passes through a temporary does so in slices that stay in the second-level cache of a large GPU.
SLICE_BYTES = 32 << 20
_ALIGNMENT = 64  # columns: rows of E start on 128 bytes (16-bit) or more
_BLOCK_ROWS = 128
_SINGLE_CHUNK_EXCESS = 2.0


@dataclass(frozen=True)
class Chunks:
    """The plan of one product's rows.

    Attributes:
        rows: rows per chunk; the last chunk may have fewer.
        count: number of chunks.
        beside: whether the weight's gradient is summed in itself and a byte beside each entry rather than in fp32.
    """

    rows: int
    count: int
    beside: bool = False


def bytes_of_sum(chunks: Chunks, classes: int, width: int) -> int:
    """Workspace of the sum of a 16-bit gradient ``[V, D]`` over the chunks."""
    if chunks.count == 1:
        return 0
    return classes * width + SLICE_BYTES if chunks.beside else 4 * classes * width


def row_stride(classes: int) -> int:
    """Columns from one row of E to the next."""
    return -(-classes // _ALIGNMENT) * _ALIGNMENT


def bytes_per_row(classes: int, width: int, dtype: torch.dtype, *, fused: bool, block_classes: int) -> int:
    """Workspace that one row of a chunk takes.

    E (and beside it fp32 logits where the product is not fused and E is 16-bit), 12 bytes of partials per block of
    `block_classes` classes, the row's unscaled gradient in fp32 and the scaled hidden row.
    """
    stride = row_stride(classes)
    block = stride * (dtype.itemsize if fused or dtype == torch.float32 else dtype.itemsize + 4)
    return block + 12 * -(-classes // block_classes) + width * (4 + dtype.itemsize)


def plan_chunks(
    rows: int,
    classes: int,
    width: int,
    dtype: torch.dtype,
    *,
    fused: bool,
    block_classes: int,
    weight_sum: bool,
    chunk_bytes: int | None = None,
) -> Chunks:
    """Divides `rows` into equal chunks within the workspace.

    Without `chunk_bytes` the whole workspace, the sum of the weight's gradient over several chunks included, stays
    within `WORKSPACE_BYTES` wherever that leaves enough rows: `LEAST_ROWS` beside a sum in fp32, else
    `LEAST_ROWS_BESIDE` beside a sum in the gradient itself and one byte more per entry (fewer rows starve the tensor
    cores and add to the sum too often). Where even that does not fit, chunks have `LEAST_ROWS`; and there a single
    chunk, which needs no sum, is taken if it is at most twice as large (docs/kernels.md says where).

    Args:
        rows: R >= 1.
        classes, width: V and D.
        dtype: of E.
        fused: whether the fused product is used.
        block_classes: classes per block of row statistics.
        weight_sum: whether a 16-bit gradient of the weight is wanted, which several chunks must sum more precisely.
        chunk_bytes: budget of E alone, without a least number of rows.
    """
    each = bytes_per_row(classes, width, dtype, fused=fused, block_classes=block_classes)
    in_fp32 = (WORKSPACE_BYTES - 4 * classes * width) // each if weight_sum else WORKSPACE_BYTES // each
    if chunk_bytes is not None:
        most = max(1, chunk_bytes // (row_stride(classes) * dtype.itemsize))
        return _divided(rows, most, beside=weight_sum and most > in_fp32)
    if rows * each <= WORKSPACE_BYTES:
        return Chunks(rows, 1)
    if in_fp32 >= LEAST_ROWS or not weight_sum:
        return _divided(rows, max(in_fp32, LEAST_ROWS))
    beside = bytes_of_sum(Chunks(rows, 2, beside=True), classes, width)
    most = (WORKSPACE_BYTES - beside) // each
    if most < LEAST_ROWS_BESIDE:
        most = LEAST_ROWS
        if rows * each <= _SINGLE_CHUNK_EXCESS * (most * each + beside):
            return Chunks(rows, 1)
    return _divided(rows, most, beside=True)


def _divided(rows: int, most: int, *, beside: bool = False) -> Chunks:
    """Equal chunks of at most `most` rows, of whole row blocks where there are several blocks in one."""
    if rows <= most:
        return Chunks(rows, 1)
    unit = _BLOCK_ROWS if most >= _BLOCK_ROWS else 1
    most -= most % unit
    count = -(-rows // most)
    even = -(-rows // count)
    even = -(-even // unit) * unit
    return Chunks(even, -(-rows // even), beside)
