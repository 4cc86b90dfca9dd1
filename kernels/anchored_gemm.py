"""The forward product with its epilogue: E = exp(z - z_y) written once, row statistics per vocabulary block.

Reference: ``z = hidden @ weight.T; E = exp(z - anchor); E.sum(1), z.max(1)``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ntpseg.kernels.gemm_configs import GemmConfig
from ntpseg.kernels.tl_utils import anchored_exp, narrow, operand, rebase
from ntpseg.kernels.workspace import Anchors, Partials


@triton.jit
def emit(
    z, e, anchor, limit, row_0, row, class_0, rows, classes, e_stride_8, store, WIDTH: tl.constexpr, TMA: tl.constexpr
):
    """Turns logits into E, stores it and returns the tile's row sum, maximum and arg-max."""
    column = class_0 + tl.arange(0, WIDTH)
    # In every block, not behind a branch for the last: a branch hands over z twice, and each exponential is made twice.
    z = tl.where(column[None, :] < classes, z, float("-inf"))
    value, total, top, best = anchored_exp(z, anchor, limit, column)
    if store != 0:
        if TMA:
            e.store([row_0, class_0], narrow(value, e.dtype))
        else:
            # also writes zeros between V and the padded row length, so that no reader meets garbage
            place = row.to(tl.int64)[:, None] * (e_stride_8 * 8) + column[None, :]
            inside = (row < rows)[:, None] & (column[None, :] < e_stride_8 * 8)
            tl.store(e + place, narrow(value, e.dtype.element_ty), mask=inside)
    return total, top, best


@triton.jit
def emit_parts(
    z,
    e,
    anchor,
    limit,
    row_0,
    row,
    class_0,
    rows,
    classes,
    e_stride_8,
    store,
    BR: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
    PARTS: tl.constexpr,
):
    """`emit` on PARTS column parts, one after the other: fewer temporaries and less staging memory at a time."""
    if PARTS == 1:
        total, top, best = emit(z, e, anchor, limit, row_0, row, class_0, rows, classes, e_stride_8, store, WIDTH, TMA)
    else:
        half: tl.constexpr = WIDTH // 2
        left, right = tl.split(tl.permute(tl.reshape(z, (BR, 2, half)), (0, 2, 1)))
        total, top, best = emit_parts(
            left, e, anchor, limit, row_0, row, class_0, rows, classes, e_stride_8, store, BR, half, TMA, PARTS // 2
        )
        class_1 = class_0 + half
        total_r, top_r, best_r = emit_parts(
            right, e, anchor, limit, row_0, row, class_1, rows, classes, e_stride_8, store, BR, half, TMA, PARTS // 2
        )
        # each part may have taken its own maximum as anchor: bring both sums to that of the whole
        best = tl.where(top_r > top, best_r, best)
        whole = tl.maximum(top, top_r)
        total = total * rebase(top, whole, anchor, limit) + total_r * rebase(top_r, whole, anchor, limit)
        top = whole
    return total, top, best


@triton.jit(
    do_not_specialize=["rows", "classes", "width_8", "hidden_stride_8", "weight_stride_8", "e_stride_8", "store"]
)
def anchored_gemm_kernel(
    hidden,
    weight,
    e,
    anchor_ptr,
    limit_ptr,
    block_ptr,
    count_ptr,
    sum_ptr,
    max_ptr,
    arg_ptr,
    rows,
    classes,
    width_8,
    hidden_stride_8,
    weight_stride_8,
    e_stride_8,
    store,
    BR: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    PARTS: tl.constexpr,
):
    # strides arrive in units of 8 so that 16-byte alignment is known to the compiler also where D % 16 == 8
    width = width_8 * 8
    row_blocks = tl.load(count_ptr)
    class_blocks = tl.cdiv(classes, BV)
    depth = tl.cdiv(width, BD)
    # About GROUP row blocks share each weight tile while it is in L2; groups of one size, or a last group of a single
    # block would read the whole weight from memory for itself.
    most = tl.cdiv(row_blocks, tl.maximum(tl.cdiv(row_blocks, GROUP), 1))
    for tile in tl.range(tl.program_id(0), row_blocks * class_blocks, tl.num_programs(0), flatten=FLATTEN):
        group = tile // (most * class_blocks)
        first = group * most
        size = tl.minimum(row_blocks - first, most)
        slot = first + (tile % (most * class_blocks)) % size
        class_block = (tile % (most * class_blocks)) // size
        row_0 = tl.load(block_ptr + slot) * BR
        class_0 = class_block * BV
        row = row_0 + tl.arange(0, BR)
        column = class_0 + tl.arange(0, BV)

        z = tl.zeros((BR, BV), dtype=tl.float32)
        if TMA:
            for k in range(depth):
                a = hidden.load([row_0, k * BD])
                b = weight.load([class_0, k * BD])
                z = tl.dot(operand(a), operand(b).T, z, input_precision="ieee")
        else:
            feature = tl.arange(0, BD)
            # rows past the end read the last one: their results are never stored, and no mask is needed
            a_ptr = hidden + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * (hidden_stride_8 * 8) + feature[None, :]
            b_row = tl.minimum(column, classes - 1).to(tl.int64)
            b_ptr = weight + b_row[:, None] * (weight_stride_8 * 8) + feature[None, :]
            for k in range(depth):
                inside = feature[None, :] < width - k * BD
                a = tl.load(a_ptr, mask=inside, other=0.0)
                b = tl.load(b_ptr, mask=inside, other=0.0)
                z = tl.dot(operand(a), operand(b).T, z, input_precision="ieee")
                a_ptr += BD
                b_ptr += BD

        inside_row = row < rows
        anchor = tl.load(anchor_ptr + row, mask=inside_row, other=0.0)
        limit = tl.load(limit_ptr + row, mask=inside_row, other=0.0)
        total, top, best = emit_parts(
            z, e, anchor, limit, row_0, row, class_0, rows, classes, e_stride_8, store, BR, BV, TMA, PARTS
        )
        place = class_block * rows + row
        tl.store(sum_ptr + place, total, mask=inside_row)
        tl.store(max_ptr + place, top, mask=inside_row)
        tl.store(arg_ptr + place, best, mask=inside_row)


def anchored_gemm(
    hidden: Tensor,
    weight: Tensor,
    e: Tensor | None,
    anchors: Anchors,
    partials: Partials,
    blocks: Tensor,
    count: Tensor,
    config: GemmConfig,
    programs: int,
) -> None:
    """Launches `anchored_gemm_kernel` on the current stream.

    Args:
        hidden: ``[R, D]``, last dimension contiguous, 16-byte aligned rows.
        weight: ``[V, D]``, the same.
        e: ``[R, >= V]`` with 16-byte aligned rows, overwritten up to its width; None keeps statistics only.
        anchors: per row, see `Anchors`.
        partials: overwritten for the row blocks that are computed.
        blocks: int32, row blocks of ``config.rows`` to compute; the first `count` entries are read.
        count: 0-dim int32 on the device, so that an empty redo needs no synchronisation.
        config: tile shape and pipelining.
        programs: size of the persistent grid.
    """
    rows, width = hidden.shape
    # statistics alone still compile the store: it gets a block that it never writes
    target = e if e is not None else torch.empty(config.rows, config.classes, dtype=hidden.dtype, device=hidden.device)
    operands: list[object] = [hidden, weight, target]
    if config.tma:
        operands = [
            TensorDescriptor.from_tensor(hidden, [config.rows, config.depth]),
            TensorDescriptor.from_tensor(weight, [config.classes, config.depth]),
            TensorDescriptor.from_tensor(target, [config.rows, config.classes // config.parts]),
        ]
    anchored_gemm_kernel[(programs,)](
        *operands,
        anchors.anchor,
        anchors.limit,
        blocks,
        count,
        partials.sum,
        partials.max,
        partials.arg,
        rows,
        weight.shape[0],
        width // 8,
        hidden.stride(0) // 8,
        weight.stride(0) // 8,
        target.stride(0) // 8,
        int(e is not None),
        BR=config.rows,
        BV=config.classes,
        BD=config.depth,
        GROUP=config.group,
        TMA=config.tma,
        FLATTEN=config.flatten,
        PARTS=config.parts,
        num_warps=config.warps,
        num_stages=config.stages,
    )
