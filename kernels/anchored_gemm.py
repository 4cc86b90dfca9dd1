"""The forward product with its epilogue: E = exp(z - z_y) written once, row statistics per vocabulary block.

Reference: ``z = hidden @ weight.T; E = exp(z - anchor); E.sum(1), z.max(1)``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ntpseg.kernels.gemm_configs import GemmConfig
from ntpseg.kernels.tl_utils import ROW_POINTERS, anchored_exp, downcast, rescale_factor, upcast_if_interpreted
from ntpseg.kernels.workspace import Anchors, BlockStats


@triton.jit
def epilogue(
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
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_N: tl.constexpr,
):
    """Turns logits into E, stores it and returns the tile's row sum, maximum and arg-max."""
    column = class_0 + tl.arange(0, BLOCK_N)
    if not EVEN_N:
        # In every block, not behind a branch for the last: a branch yields z twice, and each exponential is made twice.
        z = tl.where(column[None, :] < classes, z, float("-inf"))
    value, row_sum, row_max, argmax = anchored_exp(z, anchor, limit, column)
    if store != 0:
        if TMA:
            e.store([row_0, class_0], downcast(value, e.dtype))
        else:
            # also writes zeros between V and the padded row length, so that no reader meets garbage
            offsets = row.to(tl.int64)[:, None] * (e_stride_8 * 8) + column[None, :]
            mask = (row < rows)[:, None] & (column[None, :] < e_stride_8 * 8)
            tl.store(e + offsets, downcast(value, e.dtype.element_ty), mask=mask)
    return row_sum, row_max, argmax


@triton.jit
def epilogue_subtiles(
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_N: tl.constexpr,
    EPILOGUE_SUBTILE: tl.constexpr,
):
    """`epilogue` on column parts, one after the other: fewer temporaries and less staging memory at a time."""
    if EPILOGUE_SUBTILE == 1:
        row_sum, row_max, argmax = epilogue(
            z, e, anchor, limit, row_0, row, class_0, rows, classes, e_stride_8, store, BLOCK_N, TMA, EVEN_N
        )
    else:
        half: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(z, (BLOCK_M, 2, half)), (0, 2, 1)))
        row_sum, row_max, argmax = epilogue_subtiles(
            left,
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
            BLOCK_M,
            half,
            TMA,
            EVEN_N,
            EPILOGUE_SUBTILE // 2,
        )
        class_1 = class_0 + half
        right_sum, right_max, right_argmax = epilogue_subtiles(
            right,
            e,
            anchor,
            limit,
            row_0,
            row,
            class_1,
            rows,
            classes,
            e_stride_8,
            store,
            BLOCK_M,
            half,
            TMA,
            EVEN_N,
            EPILOGUE_SUBTILE // 2,
        )
        # each part may have taken its own maximum as anchor: bring both sums to that of the whole
        argmax = tl.where(right_max > row_max, right_argmax, argmax)
        whole = tl.maximum(row_max, right_max)
        row_sum = row_sum * rescale_factor(row_max, whole, anchor, limit) + right_sum * rescale_factor(
            right_max, whole, anchor, limit
        )
        row_max = whole
    return row_sum, row_max, argmax


@triton.jit(
    do_not_specialize=["rows", "classes", "width_8", "hidden_stride_8", "weight_stride_8", "e_stride_8", "store"],
    do_not_specialize_on_alignment=ROW_POINTERS,
)
def anchored_gemm_kernel(
    hidden,
    weight,
    e,
    anchor_ptr,
    limit_ptr,
    row_blocks_ptr,
    num_row_blocks_ptr,
    row_sum_ptr,
    row_max_ptr,
    argmax_ptr,
    rows,
    classes,
    width_8,
    hidden_stride_8,
    weight_stride_8,
    e_stride_8,
    store,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    EVEN_N: tl.constexpr,
    EPILOGUE_SUBTILE: tl.constexpr,
):
    # strides arrive in units of 8 so that 16-byte alignment is known to the compiler also where D % 16 == 8
    width = width_8 * 8
    if num_row_blocks_ptr is None:
        num_row_blocks = tl.cdiv(rows, BLOCK_M)
    else:
        num_row_blocks = tl.load(num_row_blocks_ptr)
        if num_row_blocks == 0:  # the usual end of a launch over rows to recompute: before barriers and descriptors
            return
    num_class_blocks = tl.cdiv(classes, BLOCK_N)
    depth = tl.cdiv(width, BLOCK_K)
    # About GROUP_SIZE_M row blocks share each weight tile while it is in L2; groups of one size, or a last group of a
    # single block would read the whole weight from memory for itself.
    group_rows = tl.cdiv(num_row_blocks, tl.maximum(tl.cdiv(num_row_blocks, GROUP_SIZE_M), 1))
    for tile in tl.range(tl.program_id(0), num_row_blocks * num_class_blocks, tl.num_programs(0), flatten=FLATTEN):
        group = tile // (group_rows * num_class_blocks)
        first = group * group_rows
        size = tl.minimum(num_row_blocks - first, group_rows)
        slot = first + (tile % (group_rows * num_class_blocks)) % size
        class_block = (tile % (group_rows * num_class_blocks)) // size
        if row_blocks_ptr is None:
            row_block = slot
        else:
            row_block = tl.load(row_blocks_ptr + slot)
        row_0 = row_block * BLOCK_M
        class_0 = class_block * BLOCK_N
        row = row_0 + tl.arange(0, BLOCK_M)
        column = class_0 + tl.arange(0, BLOCK_N)

        z = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if TMA:
            for k in range(depth):
                a = hidden.load([row_0, k * BLOCK_K])
                b = weight.load([class_0, k * BLOCK_K])
                z = tl.dot(upcast_if_interpreted(a), upcast_if_interpreted(b).T, z, input_precision="ieee")
        else:
            offs_k = tl.arange(0, BLOCK_K)
            # rows past the end read the last one: their results are never stored, and no mask is needed
            a_ptr = hidden + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * (hidden_stride_8 * 8) + offs_k[None, :]
            b_row = tl.minimum(column, classes - 1).to(tl.int64)
            b_ptr = weight + b_row[:, None] * (weight_stride_8 * 8) + offs_k[None, :]
            for k in range(depth):
                mask = offs_k[None, :] < width - k * BLOCK_K
                a = tl.load(a_ptr, mask=mask, other=0.0)
                b = tl.load(b_ptr, mask=mask, other=0.0)
                z = tl.dot(upcast_if_interpreted(a), upcast_if_interpreted(b).T, z, input_precision="ieee")
                a_ptr += BLOCK_K
                b_ptr += BLOCK_K

        row_mask = row < rows
        anchor = tl.load(anchor_ptr + row, mask=row_mask, other=0.0)
        limit = tl.load(limit_ptr + row, mask=row_mask, other=0.0)
        row_sum, row_max, argmax = epilogue_subtiles(
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
            BLOCK_M,
            BLOCK_N,
            TMA,
            EVEN_N,
            EPILOGUE_SUBTILE,
        )
        offsets = class_block * rows + row
        tl.store(row_sum_ptr + offsets, row_sum, mask=row_mask)
        tl.store(row_max_ptr + offsets, row_max, mask=row_mask)
        tl.store(argmax_ptr + offsets, argmax, mask=row_mask)


def gemm_operands(hidden: Tensor, weight: Tensor, e: Tensor | None, config: GemmConfig) -> tuple[object, ...]:
    """The matrices as `anchored_gemm_kernel` takes them: made once where a chunk is launched twice.

    Args:
        hidden, weight, e, config: see `anchored_gemm`.

    Returns:
        Tensors, or descriptors of them.
    """
    # statistics alone still compile the store: it gets a block that it never writes
    target = e if e is not None else hidden.new_empty(config.BLOCK_M, config.BLOCK_N)
    if not config.TMA:
        return hidden, weight, target
    return (
        TensorDescriptor.from_tensor(hidden, [config.BLOCK_M, config.BLOCK_K]),
        TensorDescriptor.from_tensor(weight, [config.BLOCK_N, config.BLOCK_K]),
        TensorDescriptor.from_tensor(target, [config.BLOCK_M, config.BLOCK_N // config.EPILOGUE_SUBTILE]),
    )


def anchored_gemm(
    hidden: Tensor,
    weight: Tensor,
    e: Tensor | None,
    anchors: Anchors,
    block_stats: BlockStats,
    row_blocks: Tensor | None,
    num_row_blocks: Tensor | None,
    config: GemmConfig,
    programs: int,
    operands: tuple[object, ...] | None = None,
) -> None:
    """Launches `anchored_gemm_kernel` on the current stream.

    Args:
        hidden: ``[R, D]``, last dimension contiguous, 16-byte aligned rows.
        weight: ``[V, D]``, the same.
        e: ``[R, >= V]`` with 16-byte aligned rows, overwritten up to its width; None keeps statistics only.
        anchors: per row, see `Anchors`.
        block_stats: overwritten for the row blocks that are computed.
        row_blocks: int32, row blocks of ``config.BLOCK_M`` to compute; the first `num_row_blocks` entries are read.
            None: the first `num_row_blocks` row blocks, and no list stands between a tile and its loads.
        num_row_blocks: 0-dim int32 on the device, so that an empty list needs no synchronisation. None: all.
        config: tile shape and pipelining.
        programs: size of the persistent grid.
        operands: from `gemm_operands` of the same matrices; None makes them.
    """
    if config.PINGPONG:
        # imported here: Gluon is experimental, and a Triton without it still has every other choice
        from ntpseg.kernels.pingpong_gemm import pingpong_gemm

        pingpong_gemm(hidden, weight, e, anchors, block_stats, row_blocks, num_row_blocks, config, programs)
        return
    rows, width = hidden.shape
    operands = operands or gemm_operands(hidden, weight, e, config)
    anchored_gemm_kernel[(programs,)](
        *operands,
        anchors.anchor,
        anchors.limit,
        row_blocks,
        num_row_blocks,
        block_stats.row_sum,
        block_stats.row_max,
        block_stats.argmax,
        rows,
        weight.shape[0],
        width // 8,
        hidden.stride(0) // 8,
        weight.stride(0) // 8,
        (e.stride(0) if e is not None else config.BLOCK_N) // 8,
        int(e is not None),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        GROUP_SIZE_M=config.GROUP_SIZE_M,
        TMA=config.TMA,
        FLATTEN=config.FLATTEN,
        EVEN_N=weight.shape[0] % config.BLOCK_N == 0,
        EPILOGUE_SUBTILE=config.EPILOGUE_SUBTILE,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
