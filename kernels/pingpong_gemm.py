"""The forward product of `anchored_gemm` with two warp groups that take turns: Hopper only, written in Gluon.

Twelve warps: two consumers of four and a producer (one warp that works, three that complete its register group).
Each consumer owns whole tiles, alternately; while one turns its logits into E, the tensor cores are the other's. Three
kinds of mbarrier keep the order, all of count one:

- ``full[stage]`` (arrived at by the copies) and ``empty[stage]`` (by whoever has multiplied the stage) hand the stages
  of one ring from the producer to the consumers and back. Steps are numbered through all tiles of a program: step s
  lies in stage ``s % NUM_STAGES``, its parity is that of ``s // NUM_STAGES``.
- ``turn[w]``: consumer w may start its products; the other arrives there once its own are issued. A parity tells a
  phase from the one before, not from the one before that, and a consumer does not see the phases of the other's steps:
  only after its turn has come is each stage full with the step that it waits for, or with the one just before.

Reference: the same as that of `ntpseg.kernels.anchored_gemm`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ntpseg.kernels.gemm_configs import GemmConfig
from ntpseg.kernels.tl_utils import INT32_MAX, LOG2E
from ntpseg.kernels.workspace import Anchors, BlockStats

# Triton 3.6 has the long names; 3.9 keeps those only to raise an error
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

# A stage is released once the product after it has been issued, which takes a stage of its own.
MIN_STAGES = 2

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
# Registers per thread of the second consumer and of the producer; the first consumer gets what is left, 240.
_WORKER_REGISTERS = gl.constexpr([240, 24])


@gluon.jit
def locate(tile, num_row_blocks, num_class_blocks, group_rows):
    """Place in the list of row blocks and class block of a tile, in the order of `anchored_gemm_kernel`."""
    group = tile // (group_rows * num_class_blocks)
    first = group * group_rows
    size = gl.minimum(num_row_blocks - first, group_rows)
    inner = tile % (group_rows * num_class_blocks)
    return first + inner % size, inner // size


@gluon.jit
def listed(row_blocks_ptr, slot):
    """Row block at a place of the list; without a list the place itself."""
    if row_blocks_ptr is None:
        return slot
    else:
        return gl.load(row_blocks_ptr + slot)


@gluon.jit
def produce(
    ring,
    hidden,
    weight,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    NUM_STAGES: gl.constexpr,
):
    """Copies the operands of every tile of this program, in order, as stages become empty."""
    a_ring, b_ring, full, empty, row_blocks_ptr, num_row_blocks, num_class_blocks, group_rows, depth = ring
    step = 0
    for tile in range(gl.program_id(0), num_row_blocks * num_class_blocks, gl.num_programs(0)):
        slot, class_block = locate(tile, num_row_blocks, num_class_blocks, group_rows)
        row_0 = listed(row_blocks_ptr, slot) * BLOCK_M
        class_0 = class_block * BLOCK_N
        for k in range(depth):
            stage = step % NUM_STAGES
            # of the phase before this one: at once in the first round
            mbarrier.wait(empty.index(stage), (step // NUM_STAGES & 1) ^ 1)
            # columns and rows outside the operands arrive as zeros and count as bytes all the same
            mbarrier.expect(full.index(stage), (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
            tma_load(hidden, [row_0, k * BLOCK_K], full.index(stage), a_ring.index(stage))
            tma_load(weight, [class_0, k * BLOCK_K], full.index(stage), b_ring.index(stage))
            step += 1


@gluon.jit
def consume(
    ring,
    results,
    turns,
    WHO: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    MASK: gl.constexpr,
):
    """Products and epilogue of every second tile of this program, starting with tile `WHO`."""
    a_ring, b_ring, full, empty, row_blocks_ptr, num_row_blocks, num_class_blocks, group_rows, depth = ring
    e, anchor_ptr, limit_ptr, row_sum_ptr, row_max_ptr, argmax_ptr, rows, classes, store = results
    staging, turn, idle = turns
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    own = staging.index(WHO)
    step = WHO * depth
    # the first turn is that of consumer 0, without waiting: the parity of a phase before the first
    parity = WHO ^ 1
    tiles = num_row_blocks * num_class_blocks
    for tile in range(gl.program_id(0) + WHO * gl.num_programs(0), tiles, 2 * gl.num_programs(0)):
        slot, class_block = locate(tile, num_row_blocks, num_class_blocks, group_rows)
        row_0 = listed(row_blocks_ptr, slot) * BLOCK_M
        class_0 = class_block * BLOCK_N
        mbarrier.wait(turn.index(WHO), parity)
        parity = parity ^ 1
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, layout)
        for k in range(depth):
            stage = step % NUM_STAGES
            mbarrier.wait(full.index(stage), step // NUM_STAGES & 1)
            acc = warpgroup_mma(a_ring.index(stage), b_ring.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
            # the product before this one is through with its operands
            mbarrier.arrive(empty.index((step + NUM_STAGES - 1) % NUM_STAGES), count=1, pred=k > 0)
            step += 1
        mbarrier.arrive(turn.index(1 - WHO), count=1)
        z = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(empty.index((step + NUM_STAGES - 1) % NUM_STAGES), count=1)
        step += depth  # those of the other consumer
        # Always true. It is a branch: without one the assembler moves the epilogue before the arrival just above.
        mbarrier.wait(idle.index(0), 1)

        row = row_0 + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
        row_mask = row < rows
        anchor = gl.load(anchor_ptr + row, mask=row_mask, other=0.0)
        limit = gl.load(limit_ptr + row, mask=row_mask, other=0.0)
        column = class_0 + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
        if MASK:
            z = gl.where(column[None, :] < classes, z, float("-inf"))
        # see `anchored_exp`
        row_max = gl.max(z, 1)
        argmax = gl.min(gl.where(z == row_max[:, None], column[None, :], INT32_MAX), 1)
        mbarrier.wait(idle.index(0), 1)
        tile_anchor = gl.where(row_max > limit, row_max * LOG2E, anchor)
        value = gl.exp2(gl.fma(z, LOG2E, -tile_anchor[:, None]))
        row_sum = gl.sum(value, 1)
        if store != 0:
            tma.store_wait(0)  # the tile before has left the staging buffer
            own.store(value.to(e.dtype))
            fence_async_shared()
            # clipped at R and at the row length of E: behind V it writes zeros
            tma_store(e, [row_0, class_0], own)
        offsets = class_block * rows + row
        gl.store(row_sum_ptr + offsets, row_sum, mask=row_mask)
        gl.store(row_max_ptr + offsets, row_max, mask=row_mask)
        gl.store(argmax_ptr + offsets, argmax, mask=row_mask)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["rows", "classes", "depth", "store"],
    do_not_specialize_on_alignment=["anchor_ptr", "limit_ptr"],  # those of a chunk start anywhere
)
def pingpong_gemm_kernel(
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
    depth,
    store,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_SIZE_M: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    MASK: gl.constexpr,
):
    if num_row_blocks_ptr is None:
        num_row_blocks = (rows + BLOCK_M - 1) // BLOCK_M
    else:
        num_row_blocks = gl.load(num_row_blocks_ptr)
    num_class_blocks = (classes + BLOCK_N - 1) // BLOCK_N
    groups = gl.maximum((num_row_blocks + GROUP_SIZE_M - 1) // GROUP_SIZE_M, 1)
    group_rows = (num_row_blocks + groups - 1) // groups

    a_ring = gl.allocate_shared_memory(hidden.dtype, [NUM_STAGES, BLOCK_M, BLOCK_K], hidden.layout)
    b_ring = gl.allocate_shared_memory(weight.dtype, [NUM_STAGES, BLOCK_N, BLOCK_K], weight.layout)
    staging = gl.allocate_shared_memory(e.dtype, [2, BLOCK_M, BLOCK_N], e.layout)
    full = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM_STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    idle = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    mbarrier.init(idle.index(0), count=1)
    fence_async_shared()  # the copies see the barriers

    # what all three are given, and what both consumers are
    ring = (a_ring, b_ring, full, empty, row_blocks_ptr, num_row_blocks, num_class_blocks, group_rows, depth)
    results = (e, anchor_ptr, limit_ptr, row_sum_ptr, row_max_ptr, argmax_ptr, rows, classes, store)
    turns = (staging, turn, idle)
    gl.warp_specialize(
        [
            (consume, (ring, results, turns, gl.constexpr(0), BLOCK_M, BLOCK_N, NUM_STAGES, MASK)),
            (consume, (ring, results, turns, gl.constexpr(1), BLOCK_M, BLOCK_N, NUM_STAGES, MASK)),
            (produce, (ring, hidden, weight, BLOCK_M, BLOCK_N, BLOCK_K, NUM_STAGES)),
        ],
        [4, 1],
        _WORKER_REGISTERS,
    )


def pingpong_gemm(
    hidden: Tensor,
    weight: Tensor,
    e: Tensor | None,
    anchors: Anchors,
    block_stats: BlockStats,
    row_blocks: Tensor | None,
    num_row_blocks: Tensor | None,
    config: GemmConfig,
    programs: int,
) -> None:
    """Launches `pingpong_gemm_kernel` on the current stream; arguments and results as of `anchored_gemm`.

    Without `row_blocks` the first `num_row_blocks` row blocks are computed, without either all.

    ``config.num_stages`` is the depth of the ring, ``config.num_warps`` (4) that of one consumer. FLATTEN and
    EPILOGUE_SUBTILE do not apply.

    Raises:
        TypeError: operands that are neither bfloat16 nor float16.
        ValueError: fewer than two stages.
    """
    if hidden.dtype not in _DTYPES:
        raise TypeError(f"hidden must be bfloat16 or float16 for a ping-pong product, got {hidden.dtype}")
    if config.num_stages < MIN_STAGES:
        raise ValueError(f"num_stages must be at least {MIN_STAGES} for a ping-pong product, got {config.num_stages}")
    dtype = _DTYPES[hidden.dtype]
    rows, width = hidden.shape
    # statistics alone still compile the store: it gets a block that it never writes
    target = (
        e if e is not None else torch.empty(config.BLOCK_M, config.BLOCK_N, dtype=hidden.dtype, device=hidden.device)
    )

    def descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(x, block, gl.NVMMASharedLayout.get_default_for(block, dtype))

    pingpong_gemm_kernel[(programs,)](
        descriptor(hidden, [config.BLOCK_M, config.BLOCK_K]),
        descriptor(weight, [config.BLOCK_N, config.BLOCK_K]),
        descriptor(target, [config.BLOCK_M, config.BLOCK_N]),
        anchors.anchor,
        anchors.limit,
        row_blocks,
        num_row_blocks,
        block_stats.row_sum,
        block_stats.row_max,
        block_stats.argmax,
        rows,
        weight.shape[0],
        -(-width // config.BLOCK_K),
        int(e is not None),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        GROUP_SIZE_M=config.GROUP_SIZE_M,
        NUM_STAGES=config.num_stages,
        MASK=weight.shape[0] % config.BLOCK_N != 0,
        num_warps=config.num_warps,
    )
