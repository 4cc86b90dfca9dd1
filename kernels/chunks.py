"""How many rows share one block of E, from a byte budget, and how the weight's gradient is summed over the chunks.

Two workspaces: "small" keeps to a gibibyte, "fast" takes as many rows as keep the traffic of that sum beside the point.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

WORKSPACES = ("small", "fast")
WORKSPACE_BYTES = 1 << 30
# A tenth of a card of 80 GB.
FAST_WORKSPACE_BYTES = 8 << 30
# Of the time of the three products, what the sum of the weight's gradient may take with "fast".
MAX_SUM_SHARE = 0.02
# What a product computes while the sum moves a byte: an H100's 750 TFLOP/s (16-bit; half of it TF32) over its 3.0 TB/s.
_FLOPS_PER_BYTE = {2: 250.0, 4: 125.0}
MIN_ROWS = 2048
# The split accumulator moves 6 bytes per entry and chunk, the fp32 sum 8: at 3/4 of the rows as much.
MIN_ROWS_SPLIT = 1536
# A product that passes through a temporary does so in slices that stay in the second-level cache of a large GPU.
SLICE_BYTES = 32 << 20
ALIGNMENT = 64  # columns: rows of E start on 128 bytes (16-bit) or more
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


def sum_bytes(chunks: Chunks, classes: int, width: int, *, needs_accumulator: bool = True) -> int:
    """Bytes of device memory that the sum of the weight's gradient ``[V, D]`` over the chunks moves.

    Per entry: a product that adds to an fp32 sum reads and writes it (8), and the copy into a 16-bit gradient reads it
    once more; an addition to a split accumulator reads and writes three bytes, its fp32 operand staying in the cache.
    What the product of a single chunk writes is in any product and not counted.
    """
    if chunks.count == 1:
        return 0
    if chunks.split_accumulator:
        return 6 * (chunks.count - 1) * classes * width
    return 8 * (chunks.count if needs_accumulator else chunks.count - 1) * classes * width


def sum_share(chunks: Chunks, rows: int, itemsize: int, *, needs_accumulator: bool = True) -> float:
    """Time of that sum over the time of the three products (6RVD FLOPs) on an H100, as if they did not overlap."""
    per_entry = sum_bytes(chunks, 1, 1, needs_accumulator=needs_accumulator)
    return per_entry * _FLOPS_PER_BYTE[itemsize] / (6.0 * rows)


def row_stride(classes: int) -> int:
    """Columns from one row of E to the next."""
    return -(-classes // ALIGNMENT) * ALIGNMENT


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
    workspace: str = "small",
) -> Chunks:
    """Divides `rows` into equal chunks within the workspace.

    "small", without `chunk_bytes`: the whole workspace, the sum of the weight's gradient over several chunks included,
    stays within `WORKSPACE_BYTES` wherever that leaves enough rows: `MIN_ROWS` with an accumulator in fp32, else
    `MIN_ROWS_SPLIT` with a split one (fewer rows starve the tensor cores and add to the sum too often). Where even that
    does not fit, chunks have `MIN_ROWS`; and there a single chunk, which needs no sum, is taken if it is at most twice
    as large (docs/kernels.md says where).

    "fast": the fewest rows per chunk with which the sum of the weight's gradient takes at most `MAX_SUM_SHARE` of the
    time of the products, in fp32 or, where that is more than `FAST_WORKSPACE_BYTES`, in a split accumulator; where both
    are more, the rows that fit. It is "small" where that is as good: always for R <= 6,272, V = 32,768.

    Args:
        rows: R >= 1.
        classes, width: V and D.
        dtype: of E.
        fused: whether the fused product is used.
        BLOCK_N: classes per block of row statistics.
        needs_accumulator: whether a 16-bit gradient of the weight is wanted, which several chunks must sum more
            precisely.
        chunk_bytes: budget of E alone, without a least number of rows; overrides `workspace`.
        workspace: one of `WORKSPACES`.
    """
    row_bytes = bytes_per_row(classes, width, dtype, fused=fused, BLOCK_N=BLOCK_N)
    fp32_accumulator = 4 * classes * width if needs_accumulator else 0
    in_fp32 = (WORKSPACE_BYTES - fp32_accumulator) // row_bytes
    if chunk_bytes is not None:
        max_rows = max(1, chunk_bytes // (row_stride(classes) * dtype.itemsize))
        return _divided(rows, max_rows, split_accumulator=needs_accumulator and max_rows > in_fp32)
    if workspace == "fast":
        small = plan_chunks(
            rows, classes, width, dtype, fused=fused, BLOCK_N=BLOCK_N, needs_accumulator=needs_accumulator
        )
        return _fast(small, rows, classes, width, dtype.itemsize, row_bytes, needs_accumulator=needs_accumulator)
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


def workspace_bytes(
    chunks: Chunks,
    classes: int,
    width: int,
    dtype: torch.dtype,
    *,
    fused: bool,
    BLOCK_N: int,
    needs_accumulator: bool,
) -> int:
    """What a plan takes beyond the gradients; arguments as in `plan_chunks`."""
    accumulator = accumulator_bytes(chunks, classes, width) if needs_accumulator else 0
    return chunks.rows * bytes_per_row(classes, width, dtype, fused=fused, BLOCK_N=BLOCK_N) + accumulator


def _fast(
    small: Chunks,
    rows: int,
    classes: int,
    width: int,
    itemsize: int,
    row_bytes: int,
    *,
    needs_accumulator: bool,
) -> Chunks:
    """The plan of the workspace "fast"; `small` is that of "small"."""

    def total_bytes(plan: Chunks) -> int:
        return plan.rows * row_bytes + (accumulator_bytes(plan, classes, width) if needs_accumulator else 0)

    def share(plan: Chunks) -> float:
        return sum_share(plan, rows, itemsize, needs_accumulator=needs_accumulator)

    if share(small) <= MAX_SUM_SHARE:
        return small
    for split in (False, True) if needs_accumulator else (False,):
        # one chunk needs no sum, and each more costs a sum the same
        count = 1
        while share(Chunks(-(-rows // (count + 1)), count + 1, split)) <= MAX_SUM_SHARE:
            count += 1
        plan = _divided(rows, _whole_blocks(-(-rows // count)), split_accumulator=split)
        if total_bytes(plan) <= FAST_WORKSPACE_BYTES:
            return plan
    accumulator = accumulator_bytes(Chunks(rows, 2, needs_accumulator), classes, width) if needs_accumulator else 0
    max_rows = (FAST_WORKSPACE_BYTES - accumulator) // row_bytes
    return _divided(rows, max_rows, split_accumulator=needs_accumulator) if max_rows > small.rows else small


def _whole_blocks(rows: int) -> int:
    return -(-rows // _BLOCK_ROWS) * _BLOCK_ROWS


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
