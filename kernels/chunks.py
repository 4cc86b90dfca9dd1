"""How many rows share one block of E, from a byte budget, and how the weight's gradient is summed over the chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

WORKSPACE_BYTES = 1 << 30
MIN_ROWS = 2048
# The split accumulator moves 6 bytes per entry and chunk, the fp32 sum 8: at 3/4 of the rows as much.
MIN_ROWS_SPLIT = 1536
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
        split_accumulator: whether the weight's gradient is summed in itself and one byte more per entry rather than in
            fp32 (`ntpseg.kernels.weight_grad`).
    """

    rows: int
    count: int
    split_accumulator: bool = False


def accumulator_bytes(chunks: Chunks, classes: int, width: int) -> int:
    """Workspace of the sum of a 16-bit gradient ``[V, D]`` over the chunks."""
    if chunks.count == 1:
        return 0
    return classes * width + SLICE_BYTES if chunks.split_accumulator else 4 * classes * width


def row_stride(classes: int) -> int:
    """Columns from one row of E to the next."""
    return -(-classes // _ALIGNMENT) * _ALIGNMENT


def bytes_per_row(classes: int, width: int, dtype: torch.dtype, *, fused: bool, BLOCK_N: int) -> int:
    """Workspace that one row of a chunk takes.

    E (and fp32 logits where the product is not fused and E is 16-bit), 12 bytes of statistics per block of `BLOCK_N`
    classes, the row's unscaled gradient in fp32 and the scaled hidden row.
    """
    stride = row_stride(classes)
    block = stride * (dtype.itemsize if fused or dtype == torch.float32 else dtype.itemsize + 4)
    return block + 12 * -(-classes // BLOCK_N) + width * (4 + dtype.itemsize)


def plan_chunks(
    rows: int,
    classes: int,
    width: int,
    dtype: torch.dtype,
    *,
    fused: bool,
    BLOCK_N: int,
    needs_accumulator: bool,
    chunk_bytes: int | None = None,
) -> Chunks:
    """Divides `rows` into equal chunks within the workspace.

    Without `chunk_bytes` the whole workspace, the sum of the weight's gradient over several chunks included, stays
    within `WORKSPACE_BYTES` wherever that leaves enough rows: `MIN_ROWS` with an accumulator in fp32, else
    `MIN_ROWS_SPLIT` with a split one (fewer rows starve the tensor cores and add to the sum too often). Where even that
    does not fit, chunks have `MIN_ROWS`; and there a single chunk, which needs no sum, is taken if it is at most twice
    as large (docs/kernels.md says where).

    Args:
        rows: R >= 1.
        classes, width: V and D.
        dtype: of E.
        fused: whether the fused product is used.
        BLOCK_N: classes per block of row statistics.
        needs_accumulator: whether a 16-bit gradient of the weight is wanted, which several chunks must sum more
            precisely.
        chunk_bytes: budget of E alone, without a least number of rows.
    """
    row_bytes = bytes_per_row(classes, width, dtype, fused=fused, BLOCK_N=BLOCK_N)
    fp32_accumulator = 4 * classes * width if needs_accumulator else 0
    in_fp32 = (WORKSPACE_BYTES - fp32_accumulator) // row_bytes
    if chunk_bytes is not None:
        max_rows = max(1, chunk_bytes // (row_stride(classes) * dtype.itemsize))
        return _divided(rows, max_rows, split_accumulator=needs_accumulator and max_rows > in_fp32)
    if rows * row_bytes <= WORKSPACE_BYTES:
        return Chunks(rows, 1)
    if in_fp32 >= MIN_ROWS or not needs_accumulator:
        return _divided(rows, max(in_fp32, MIN_ROWS))
    accumulator = accumulator_bytes(Chunks(rows, 2, split_accumulator=True), classes, width)
    max_rows = (WORKSPACE_BYTES - accumulator) // row_bytes
    if max_rows < MIN_ROWS_SPLIT:
        max_rows = MIN_ROWS
        if rows * row_bytes <= _SINGLE_CHUNK_EXCESS * (max_rows * row_bytes + accumulator):
            return Chunks(rows, 1)
    return _divided(rows, max_rows, split_accumulator=True)


def _divided(rows: int, max_rows: int, *, split_accumulator: bool = False) -> Chunks:
    """Equal chunks of at most `max_rows` rows, of whole row blocks where there are several blocks in one."""
    if rows <= max_rows:
        return Chunks(rows, 1)
    unit = _BLOCK_ROWS if max_rows >= _BLOCK_ROWS else 1
    max_rows -= max_rows % unit
    count = -(-rows // max_rows)
    even = -(-rows // count)
    even = -(-even // unit) * unit
    return Chunks(even, -(-rows // even), split_accumulator)
