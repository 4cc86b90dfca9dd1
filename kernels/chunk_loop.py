"""The chunk loop: row results and gradients of one weight matrix, from the kernels of this folder. No autograd.

Per chunk: fused product -> row reduction -> list of row blocks to recompute -> the same product over that list
(normally empty, and then a launch that returns at once: nothing is read back to the host) -> contrastive terms -> two
products that read E.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ntpseg.kernels.chunks import Chunks, plan_chunks, row_stride
from ntpseg.kernels.contrastive import contrastive, contrastive_tokens
from ntpseg.kernels.fused_forward import FusedForward, aligned, tile_configs
from ntpseg.kernels.gemm_configs import GEMM_CONFIGS, ArchConfigs, architecture
from ntpseg.kernels.gradient_filter import create_block_mask, filtered_d_hidden
from ntpseg.kernels.logits_epilogue import LOGITS_BLOCK_N, logits_exp, logits_stats
from ntpseg.kernels.matmul import matmul
from ntpseg.kernels.memory import choose_workspace, give_up_fast
from ntpseg.kernels.row_reduce import overflow_gap, recompute_blocks, row_reduce
from ntpseg.kernels.scale_rows import scale_rows
from ntpseg.kernels.tl_utils import LOG2E
from ntpseg.kernels.vocab_parallel import Shard, all_reduce_stats, local_tokens, token_logits
from ntpseg.kernels.weight_grad import WeightGrad
from ntpseg.kernels.workspace import Anchors, BlockStats, LossWeights, RowStats

_ALIGNED_FEATURES = 8  # 16-bit features in 16 bytes


@dataclass(frozen=True)
class Segment:
    """The rows of one weight matrix.

    Attributes:
        hidden: ``[R, D]`` contiguous.
        target: ``[R]`` int64, -1 = padding.
        num_negatives: ``[R]`` int32, number of rows just before that predict the negatives.
        hard_tokens: ``[R, h]`` int64 contiguous, -1 = none.
        weights: factors of the loss; ``row_weight`` is ``[R]`` fp32.
        negatives: m.
        anchors: of the rows, moved where E is recomputed; None has them computed.
        forward: the fused product of these rows, and perhaps of some behind them, at `anchors`, if that was launched
            already; left aside where these options would not launch the same.
    """

    hidden: Tensor
    target: Tensor
    num_negatives: Tensor
    hard_tokens: Tensor
    weights: LossWeights
    negatives: int
    anchors: Anchors | None = None
    forward: FusedForward | None = None


@dataclass(frozen=True)
class LoopOptions:
    """How to compute, as opposed to what.

    Attributes:
        chunk_bytes: budget of one block of E, None for the default workspace.
        gradient_filter: probability below which whole tiles are left out of the gradients; 0 keeps all.
        fused: force (True) or forbid (False) the fused product; None takes it for 16-bit operands and pads their rows
            where they are not aligned.
        configs: tile shapes; None takes those of the device.
        workspace: "small", "fast" or "auto", see `ntpseg.losses.LossOptions`.
    """

    chunk_bytes: int | None = None
    gradient_filter: float = 0.0
    fused: bool | None = None
    configs: ArchConfigs | None = None
    workspace: str = "auto"


@dataclass(frozen=True)
class SegmentResult:
    """What the loop fills.

    Attributes:
        row_stats: row results.
        tcl, het: ``[R]`` fp32 terms per row.
        d_hidden: ``[R, D]`` or None; with an index ``[N, D]`` contiguous, whose other rows are left as they are.
        d_weight: ``[V, D]`` or None.
        d_hidden_index: ``[R]`` integer, contiguous, row of ``d_hidden`` that each row's gradient goes to, -1 = none;
            None keeps their order.
    """

    row_stats: RowStats
    tcl: Tensor
    het: Tensor
    d_hidden: Tensor | None
    d_weight: Tensor | None
    d_hidden_index: Tensor | None = None


def run_segment(
    segment: Segment, weight: Tensor, result: SegmentResult, options: LoopOptions, shard: Shard | None = None
) -> None:
    """Computes everything in `result`, on the current stream, without synchronising.

    Args:
        segment: R >= 1 rows.
        weight: ``[V, D]``, last dimension contiguous, dtype of ``segment.hidden`` (float32, bfloat16 or float16).
        result: overwritten; its gradients are made where they are tensors. Dtypes: that of hidden or float32.
        options: see `LoopOptions`.
        shard: which classes `weight` holds, where several ranks share the vocabulary (then V may be 0, ``d_hidden`` is
            this rank's part of it and should be float32); None for all of them.
    """
    fused = options.fused
    if fused is None:
        fused = segment.hidden.dtype != torch.float32
        if fused and not aligned(segment.hidden, weight):
            _run_padded(segment, weight, result, replace(options, fused=True), shard)
            return
    plan = _Plan.make(segment, weight, result, options, fused, shard)
    forward = segment.forward if plan.would_launch(segment.forward, result) else None
    buffers = _try_fast(plan, result, options, forward)
    if buffers is None:
        plan = _Plan.make(segment, weight, result, options, fused, shard)
        buffers = _Buffers.allocate(plan, result)
    if result.d_hidden is not None and buffers.e is None:
        result.d_hidden.zero_()  # a rank without classes
    anchors = segment.anchors
    if anchors is None:
        # all at once: one launch, and with a shard one reduction, rather than one a chunk
        target_logit = token_logits(segment.hidden, weight, segment.target.unsqueeze(1), shard).squeeze(1)
        anchors = Anchors(target_logit, target_logit * LOG2E.value, target_logit + overflow_gap(plan.dtype))
    # in time order: the negatives of a chunk's first rows are what the chunk before has predicted
    for start in range(0, plan.rows, plan.chunks.rows):
        rows = slice(start, min(start + plan.chunks.rows, plan.rows))
        chunk = _Chunk.make(rows, segment, anchors, result, plan, buffers)
        _forward(chunk, weight, plan)
        token = _contrast(chunk, segment, weight, result.row_stats.prediction, plan)
        if chunk.e is not None:
            _backward(chunk, token, weight, plan, buffers.weight_grad)


def _try_fast(
    plan: _Plan, result: SegmentResult, options: LoopOptions, forward: FusedForward | None
) -> _Buffers | None:
    """The buffers; None where "auto" chose more than there is, and will not do so again."""
    try:
        return _Buffers.allocate(plan, result, forward)
    except torch.OutOfMemoryError:
        if options.workspace != "auto" or plan.workspace == "small":
            raise
    # what was allocated lives as long as the exception: the next attempt must come after it
    give_up_fast(plan.device)
    return None


@dataclass(frozen=True)
class _Plan:
    """What is known before anything is computed.

    Attributes:
        rows, classes, width: R, V (of this rank) and D.
        dtype, device: of the operands, hence of E.
        fused: whether E comes from the fused product rather than from written logits.
        configs: tile shapes.
        chunks: how the rows are divided.
        workspace: "small" or "fast", what that division is for.
        gradient_filter: see `LoopOptions`.
        weights: see `Segment`.
        shard: see `run_segment`.
    """

    rows: int
    classes: int
    width: int
    dtype: torch.dtype
    device: torch.device
    fused: bool
    configs: ArchConfigs
    chunks: Chunks
    workspace: str
    gradient_filter: float
    weights: LossWeights
    shard: Shard | None

    @staticmethod
    def make(
        segment: Segment,
        weight: Tensor,
        result: SegmentResult,
        options: LoopOptions,
        fused: bool,
        shard: Shard | None,
    ) -> _Plan:
        (rows, width), classes, dtype = segment.hidden.shape, weight.shape[0], segment.hidden.dtype
        table = options.configs or GEMM_CONFIGS[architecture(weight.device)]
        configs = options.configs or tile_configs(weight.device, options.gradient_filter)
        # ranks must agree on the chunks, whatever each of them was tuned to, has memory for and wants a gradient of
        shared = shard is not None
        sizes = (rows, shard.classes_per_rank if shard is not None else classes, width, dtype)
        block_n = (table if shared else configs).forward.BLOCK_N if fused else LOGITS_BLOCK_N
        accumulates = dtype == torch.bfloat16 and (shared or result.d_weight is not None)
        how: dict[str, Any] = {"fused": fused, "BLOCK_N": block_n, "needs_accumulator": accumulates}
        workspace = options.workspace
        if options.chunk_bytes is not None or not (shared or result.d_weight is not None):
            workspace = "small"  # has no say, or nothing to gain: without the weight's gradient there is no sum
        workspace = choose_workspace(workspace, weight.device, *sizes, **how, several_ranks=shared)
        chunks = plan_chunks(*sizes, **how, chunk_bytes=options.chunk_bytes, workspace=workspace)
        device, filtered, weights = weight.device, options.gradient_filter, segment.weights
        return _Plan(rows, classes, width, dtype, device, fused, configs, chunks, workspace, filtered, weights, shard)

    def would_launch(self, forward: FusedForward | None, result: SegmentResult) -> bool:
        """Whether a product that was launched early is the one that this plan has."""
        if forward is None or not self.fused or self.shard is not None or self.chunks.count > 1:
            return False
        wants_gradient = result.d_hidden is not None or result.d_weight is not None
        return forward.config == self.configs.forward and (forward.e is not None) == wants_gradient

    @property
    def class_blocks(self) -> int:
        """Vocabulary blocks of the row statistics."""
        return -(-self.classes // (self.configs.forward.BLOCK_N if self.fused else LOGITS_BLOCK_N))

    @property
    def class_start(self) -> int:
        """First class of this rank."""
        return 0 if self.shard is None else self.shard.start

    @property
    def total_classes(self) -> int:
        """Classes of all ranks."""
        return self.classes if self.shard is None else self.shard.total


@dataclass(frozen=True)
class _Buffers:
    """What every chunk writes anew.

    Attributes:
        e: ``[C, >= V]`` in the operands' dtype; None where no gradient is wanted or this rank has no class.
        logits: ``[C, >= V]`` fp32, the same memory as `e` where that is fp32 too; None with the fused product.
        weight_grad: the sum of the weight's gradient; None where it is not wanted.
        forward: the fused product that has been launched into `e` already, or None.
    """

    e: Tensor | None
    logits: Tensor | None
    weight_grad: WeightGrad | None
    forward: FusedForward | None

    @staticmethod
    def allocate(plan: _Plan, result: SegmentResult, forward: FusedForward | None = None) -> _Buffers:
        shape = (plan.chunks.rows, row_stride(plan.classes))
        wants_gradient = result.d_hidden is not None or result.d_weight is not None
        e = logits = weight_grad = None
        if forward is not None:
            e = forward.e
        elif wants_gradient and plan.classes:
            e = torch.empty(shape, dtype=plan.dtype, device=plan.device)
        if not plan.fused and plan.classes:
            # E overwrites fp32 logits in place
            reuse = e is not None and e.dtype == torch.float32
            logits = e if reuse else torch.empty(shape, dtype=torch.float32, device=plan.device)
        if e is not None and result.d_weight is not None:
            weight_grad = WeightGrad(result.d_weight, plan.dtype, plan.chunks, plan.weights, plan.configs)
        return _Buffers(e, logits, weight_grad, forward)


@dataclass(frozen=True)
class _Chunk:
    """Some rows of everything, as views, and the statistics that live as long as the chunk.

    Attributes:
        rows: which of the segment's; C of them.
        hidden, target, hard_tokens, weights: see `Segment`.
        anchors, row_stats, block_stats: see `ntpseg.kernels.workspace`.
        tcl, het, d_hidden, d_hidden_index: see `SegmentResult`.
        e, logits, forward: see `_Buffers`; ``logits`` as wide as there are classes.
    """

    rows: slice
    hidden: Tensor
    target: Tensor
    hard_tokens: Tensor
    weights: LossWeights
    anchors: Anchors
    row_stats: RowStats
    block_stats: BlockStats
    tcl: Tensor
    het: Tensor
    d_hidden: Tensor | None
    d_hidden_index: Tensor | None
    e: Tensor | None
    logits: Tensor | None
    forward: FusedForward | None

    @staticmethod
    def make(
        rows: slice, segment: Segment, anchors: Anchors, result: SegmentResult, plan: _Plan, buffers: _Buffers
    ) -> _Chunk:
        count = rows.stop - rows.start
        d_hidden, index = result.d_hidden, result.d_hidden_index
        if index is None:
            d_hidden = None if d_hidden is None else d_hidden[rows]
        else:
            index = index[rows]
        if buffers.forward is not None:
            block_stats = buffers.forward.block_stats.first(count)
        else:
            block_stats = BlockStats.empty(plan.class_blocks, count, plan.device)
        return _Chunk(
            rows=rows,
            hidden=segment.hidden[rows],
            target=segment.target[rows],
            hard_tokens=segment.hard_tokens[rows],
            weights=segment.weights[rows],
            anchors=anchors[rows],
            row_stats=result.row_stats[rows],
            block_stats=block_stats,
            tcl=result.tcl[rows],
            het=result.het[rows],
            d_hidden=d_hidden,
            d_hidden_index=index,
            e=None if buffers.e is None else buffers.e[:count],
            logits=None if buffers.logits is None else buffers.logits[:count, : plan.classes],
            forward=buffers.forward,
        )


def _forward(chunk: _Chunk, weight: Tensor, plan: _Plan) -> None:
    """E and the row results, by the fused product or from written logits."""
    forward = chunk.forward
    if chunk.logits is not None:
        matmul(chunk.hidden, weight.t(), chunk.logits)
        logits_stats(chunk.logits, chunk.anchors, chunk.block_stats)
    elif forward is None and plan.classes:
        config = plan.configs.forward
        forward = FusedForward.make(chunk.hidden, weight, chunk.e, chunk.anchors, chunk.block_stats, config)
        forward.launch()
    row_reduce(
        all_reduce_stats(chunk.block_stats, chunk.anchors, plan.shard),
        chunk.anchors,
        chunk.row_stats,
        chunk.target,
        chunk.hard_tokens,
        chunk.weights,
        plan.total_classes,
        plan.dtype,
    )
    if chunk.e is None:
        return
    if chunk.logits is not None:
        # of every row: E has not been written yet, and by now no anchor can overflow
        logits_exp(chunk.logits, chunk.anchors, chunk.e)
    elif forward is not None:
        forward.launch(*recompute_blocks(chunk.row_stats.recompute, forward.config.BLOCK_M))


def _contrast(chunk: _Chunk, segment: Segment, weight: Tensor, prediction: Tensor, plan: _Plan) -> Tensor:
    """TCL and HET; makes E the logits' gradient but for the row scale. Returns negatives and hard tokens."""
    # all predictions up to here are known now, those of the chunk before included: they are the negatives
    token = contrastive_tokens(
        prediction,
        segment.target,
        segment.num_negatives,
        segment.hard_tokens,
        chunk.rows.start,
        chunk.rows.stop - chunk.rows.start,
        segment.negatives,
    )
    contrastive(
        chunk.e,
        token,
        # from dot products in fp32: what E holds of them is rounded, and may be on another rank
        token_logits(chunk.hidden, weight, token, plan.shard),
        chunk.anchors.target_logit,
        chunk.target,
        chunk.row_stats,
        chunk.weights,
        segment.negatives,
        chunk.tcl,
        chunk.het,
        plan.class_start,
        plan.classes,
    )
    return token


def _backward(chunk: _Chunk, token: Tensor, weight: Tensor, plan: _Plan, weight_grad: WeightGrad | None) -> None:
    """The two products that read E, over all of it or over the tiles that the gradient filter keeps."""
    assert chunk.e is not None
    e, scale = chunk.e[:, : plan.classes], chunk.row_stats.scale
    block_mask = None
    if plan.gradient_filter > 0 and plan.fused:
        block_mask = create_block_mask(
            chunk.block_stats,
            chunk.row_stats,
            chunk.anchors.target_logit,
            chunk.target,
            local_tokens(token, plan.shard),
            plan.gradient_filter,
            plan.configs.forward.BLOCK_M,
            plan.configs.forward.BLOCK_N,
            local_tokens(chunk.target, plan.shard),
        )
    if chunk.d_hidden is not None:
        out, index = chunk.d_hidden, chunk.d_hidden_index
        if block_mask is not None:
            filtered_d_hidden(e, weight, scale, out, block_mask, plan.configs.d_hidden, index)
        else:
            # scaled in fp32 and rounded once; a result in fp32 holds the unscaled product meanwhile, if in its place
            in_place = out.dtype == torch.float32 and index is None
            unscaled = out if in_place else torch.empty(chunk.hidden.shape, dtype=torch.float32, device=plan.device)
            scale_rows(matmul(e, weight, unscaled), scale, out, index=index)
    if weight_grad is not None:
        # here the row scale goes to the other operand: rows are the dimension that is summed over
        if weight_grad.scaled_by is not None:
            scale = scale * weight_grad.scaled_by
        scaled = scale_rows(chunk.hidden, scale, torch.empty_like(chunk.hidden))
        weight_grad.add(e, scaled, block_mask)


def _run_padded(
    segment: Segment, weight: Tensor, result: SegmentResult, options: LoopOptions, shard: Shard | None
) -> None:
    """`run_segment` on copies whose rows are whole multiples of 16 bytes: one more pass over the operands and over the
    gradients, where products of unaligned rows would be slow, all three of them."""
    width = weight.shape[1]
    padded_width = -(-width // _ALIGNED_FEATURES) * _ALIGNED_FEATURES

    def padded(x: Tensor) -> Tensor:
        copy = x.new_zeros(x.shape[0], padded_width)
        copy[:, :width] = x
        return copy

    def padded_like(x: Tensor | None, rows: int) -> Tensor | None:
        return None if x is None else x.new_empty(rows, padded_width)

    rows, index = segment.hidden.shape[0], result.d_hidden_index
    inner = replace(
        result,
        d_hidden=padded_like(result.d_hidden, rows),
        d_weight=padded_like(result.d_weight, weight.shape[0]),
        d_hidden_index=None,
    )
    run_segment(replace(segment, hidden=padded(segment.hidden), forward=None), padded(weight), inner, options, shard)
    if result.d_weight is not None and inner.d_weight is not None:
        result.d_weight.copy_(inner.d_weight[:, :width])
    if result.d_hidden is not None and inner.d_hidden is not None:
        if index is None:
            result.d_hidden.copy_(inner.d_hidden[:, :width])
        else:
            one = torch.ones(rows, dtype=torch.float32, device=weight.device)
            scale_rows(inner.d_hidden[:, :width], one, result.d_hidden, index=index)
