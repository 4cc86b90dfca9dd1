"""How many rows share one block of E, from a byte budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch

WORKSPACE_BYTES = 1 << 30
LEAST_ROWS = 2048
_ALIGNMENT = 64  # columns: rows of E start on 128 bytes (16-bit) or more
_BLOCK_ROWS = 128
_SINGLE_CHUNK_EXCESS = 1.25


@dataclass(frozen=True)
class Chunks:
    """The plan of one product's rows.

    Attributes:
        rows: rows per chunk; the last chunk may have fewer.
        count: number of chunks.
        stride: columns from one row of E to the next, >= V.
    """

    rows: int
    count: int
    stride: int


def bytes_per_row(classes: int, width: int, dtype: torch.dtype, *, fused: bool, block_classes: int) -> int:
    """Workspace that one row of a chunk takes.

    E (and beside it fp32 logits where the product is not fused and E is 16-bit), 12 bytes of partials per block of
    `block_classes` classes, the row's unscaled gradient in fp32 and the scaled hidden row.
    """
    stride = _stride(classes)
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
    weight_grad: bool,
    chunk_bytes: int | None = None,
) -> Chunks:
    """Divides `rows` into equal chunks within the workspace.

    Without `chunk_bytes` the whole workspace, the fp32 sum of the weight's gradient included where several chunks need
    one, stays within `WORKSPACE_BYTES`. Where no plan of at least `LEAST_ROWS` rows (fewer starve the tensor cores and
    add to the sum too often) does, the sum is not counted; and where one single chunk, which needs no sum, takes hardly
    more than that, it is a single chunk (docs/kernels.md says where).

    Args:
        rows: R >= 1.
        classes, width: V and D.
        dtype: of E.
        fused: whether the fused product is used.
        block_classes: classes per block of row statistics.
        weight_grad: whether a gradient of the weight is accumulated.
        chunk_bytes: budget of E alone, without a least number of rows.
    """
    stride = _stride(classes)
    if chunk_bytes is not None:
        return _divided(rows, max(1, chunk_bytes // (stride * dtype.itemsize)), stride)
    each = bytes_per_row(classes, width, dtype, fused=fused, block_classes=block_classes)
    if rows * each <= WORKSPACE_BYTES:
        return Chunks(rows, 1, stride)
    most = max(LEAST_ROWS, WORKSPACE_BYTES // each)
    if weight_grad and dtype != torch.float32:
        total = 4 * classes * width
        beside = (WORKSPACE_BYTES - total) // each
        if beside >= LEAST_ROWS:
            most = beside
        elif rows * each <= _SINGLE_CHUNK_EXCESS * (most * each + total):
            most = rows
    return _divided(rows, most, stride)


def _divided(rows: int, most: int, stride: int) -> Chunks:
    """Equal chunks of at most `most` rows, of whole row blocks where there are several blocks in one."""
    if rows <= most:
        return Chunks(rows, 1, stride)
    unit = _BLOCK_ROWS if most >= _BLOCK_ROWS else 1
    most -= most % unit
    count = -(-rows // most)
    even = -(-rows // count)
    even = -(-even // unit) * unit
    return Chunks(even, -(-rows // even), stride)


def _stride(classes: int) -> int:
    return -(-classes // _ALIGNMENT) * _ALIGNMENT
