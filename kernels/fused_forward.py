"""The fused product of some rows: its buffers, its launches, and when it may run before the rows are counted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ntpseg.kernels import chunks
from ntpseg.kernels.anchored_gemm import anchored_gemm, gemm_operands
from ntpseg.kernels.chunks import bytes_per_row, plan_chunks, row_stride
from ntpseg.kernels.gemm_configs import GEMM_CONFIGS, ArchConfigs, GemmConfig, architecture, persistent_grid
from ntpseg.kernels.tuned_configs import configs_for
from ntpseg.kernels.workspace import Anchors, BlockStats


@dataclass(frozen=True)
class FusedForward:
    """What `anchored_gemm` reads and writes, for one launch over all rows and one over those to recompute.

    Attributes:
        hidden: ``[C, D]``.
        weight: ``[V, D]``.
        e: ``[C, >= V]``; None keeps statistics only.
        anchors: ``[C]`` each; see `Anchors`.
        block_stats: ``[blocks, C]`` each.
        config: tile shape and pipelining.
        operands: from `gemm_operands`.
    """

    hidden: Tensor
    weight: Tensor
    e: Tensor | None
    anchors: Anchors
    block_stats: BlockStats
    config: GemmConfig
    operands: tuple[object, ...]

    @staticmethod
    def make(
        hidden: Tensor,
        weight: Tensor,
        e: Tensor | None,
        anchors: Anchors,
        block_stats: BlockStats,
        config: GemmConfig,
    ) -> FusedForward:
        """Launches nothing."""
        operands = gemm_operands(hidden, weight, e, config)
        return FusedForward(hidden, weight, e, anchors, block_stats, config, operands)

    def launch(self, row_blocks: Tensor | None = None, num_row_blocks: Tensor | None = None) -> None:
        """See `anchored_gemm` for which row blocks."""
        config = self.config
        tiles = -(-self.hidden.shape[0] // config.BLOCK_M) * self.block_stats.row_sum.shape[0]
        anchored_gemm(
            self.hidden,
            self.weight,
            self.e,
            self.anchors,
            self.block_stats,
            row_blocks,
            num_row_blocks,
            config,
            persistent_grid(config, tiles, self.hidden.device),
            self.operands,
        )


def aligned(*operands: Tensor) -> bool:
    """Whether rows start on 16 bytes and are whole multiples of it: what descriptors and wide loads need."""
    return all(
        x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0 and x.shape[1] * x.itemsize % 16 == 0
        for x in operands
    )


def tile_configs(device: torch.device, gradient_filter: float) -> ArchConfigs:
    """Those tuned on this machine, or the table's: the filter's products fit the table's forward tile only."""
    return GEMM_CONFIGS[architecture(device)] if gradient_filter > 0 else configs_for(device)


def early_config(room: int, weight: Tensor, chunk_bytes: int | None, gradient_filter: float) -> GemmConfig | None:
    """Tiles of a product that may be launched before the rows are counted, with room for all that there can be.

    Args:
        room: the most rows that there can be.
        weight: ``[V, D]``, last dimension contiguous; the hidden states will have its dtype and be contiguous.
        chunk_bytes, gradient_filter: see `ntpseg.kernels.chunk_loop.LoopOptions`.

    Returns:
        None where the product is not fused, or where `room` rows are more than one chunk or than the small workspace
        holds: any number of rows up to `room` is one chunk then, in every workspace.
    """
    if weight.dtype == torch.float32 or not aligned(weight) or not room:
        return None
    (classes, width), dtype = weight.shape, weight.dtype
    config = tile_configs(weight.device, gradient_filter).forward
    if chunk_bytes is None:
        row_bytes = bytes_per_row(classes, width, dtype, fused=True, BLOCK_N=config.BLOCK_N)
        return config if room * row_bytes <= chunks.WORKSPACE_BYTES else None
    plan = plan_chunks(
        room,
        classes,
        width,
        dtype,
        fused=True,
        BLOCK_N=config.BLOCK_N,
        needs_accumulator=False,
        chunk_bytes=chunk_bytes,
    )
    return config if plan.count == 1 else None


def launch_early(
    hidden: Tensor, weight: Tensor, anchors: Anchors, num_row_blocks: Tensor, config: GemmConfig, *, gradient: bool
) -> FusedForward | None:
    """Launches the product of the first rows of `hidden`, as many as the device knows of.

    Args:
        hidden: ``[room, D]`` contiguous; finite behind the last row.
        weight: ``[V, D]``.
        anchors: ``[room]`` each.
        num_row_blocks: 0-dim int32 on the device, in blocks of ``config.BLOCK_M`` rows.
        config: from `early_config`.
        gradient: whether E is kept.

    Returns:
        What was launched; None, and nothing was, where there is no memory for `room` rows of E.
    """
    e = None
    try:
        if gradient:
            shape = (hidden.shape[0], row_stride(weight.shape[0]))
            e = torch.empty(shape, dtype=hidden.dtype, device=hidden.device)
        block_stats = BlockStats.empty(-(-weight.shape[0] // config.BLOCK_N), hidden.shape[0], hidden.device)
        forward = FusedForward.make(hidden, weight, e, anchors, block_stats, config)
    except torch.OutOfMemoryError:
        return None
    forward.launch(num_row_blocks=num_row_blocks)
    return forward
