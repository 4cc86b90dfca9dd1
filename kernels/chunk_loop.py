"""The chunk loop: row results and gradients of one weight matrix, from the kernels of this folder. No autograd.

Per chunk: fused product -> combination -> list of rows to redo -> the same product over that list (normally empty, and
then a launch that returns at once: nothing is read back to the host) -> touch-up -> two products that read E.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ntpseg.kernels.anchored_gemm import anchored_gemm
from ntpseg.kernels.chunks import plan_chunks, row_stride
from ntpseg.kernels.contrastive import touch_up, touched_tokens
from ntpseg.kernels.gemm_configs import TABLE, Tiles, architecture, programs
from ntpseg.kernels.gradient_filter import filtered_d_hidden, live_tiles
from ntpseg.kernels.logits_epilogue import BLOCK_CLASSES, logits_exp, logits_statistics
from ntpseg.kernels.matmul import product
from ntpseg.kernels.row_reduce import Weights, combine, overflow_gap, redo_list
from ntpseg.kernels.scale_rows import scale_rows
from ntpseg.kernels.tl_utils import LOG2E
from ntpseg.kernels.vocab_parallel import Shard, own_tokens, single_logits, whole_vocabulary
from ntpseg.kernels.weight_grad import WeightSum
from ntpseg.kernels.workspace import Anchors, Partials, RowStates

_ALIGNED_FEATURES = 8  # 16-bit features in 16 bytes


@dataclass(frozen=True)
class Segment:
    """The rows of one weight matrix.

    Attributes:
        hidden: ``[R, D]`` contiguous.
        target: ``[R]`` int64, -1 = padding.
        reach: ``[R]`` int32, number of rows just before that predict the negatives.
        hard: ``[R, h]`` int64 contiguous, -1 = none.
        weights: factors of the loss; ``share`` is ``[R]`` fp32.
        negatives: m.
    """

    hidden: Tensor
    target: Tensor
    reach: Tensor
    hard: Tensor
    weights: Weights
    negatives: int


@dataclass(frozen=True)
class Setting:
    """How to compute, as opposed to what.

    Attributes:
        chunk_bytes: budget of one block of E, None for the default workspace.
        gradient_filter: probability below which whole tiles are left out of the gradients; 0 keeps all.
        fused: force (True) or forbid (False) the fused product; None takes it for 16-bit operands and pads their rows
            where they are not aligned.
        tiles: tile shapes; None takes those of the device.
    """

    chunk_bytes: int | None = None
    gradient_filter: float = 0.0
    fused: bool | None = None
    tiles: Tiles | None = None


@dataclass(frozen=True)
class SegmentResult:
    """What the loop fills.

    Attributes:
        states: row results.
        tcl, het: ``[R]`` fp32 terms per row.
        d_hidden: ``[R, D]`` or None.
        d_weight: ``[V, D]`` or None.
    """

    states: RowStates
    tcl: Tensor
    het: Tensor
    d_hidden: Tensor | None
    d_weight: Tensor | None


def aligned(*operands: Tensor) -> bool:
    """Whether rows start on 16 bytes and are whole multiples of it: what descriptors and wide loads need."""
    return all(
        x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0 and x.shape[1] * x.itemsize % 16 == 0
        for x in operands
    )


def run_segment(
    segment: Segment, weight: Tensor, result: SegmentResult, setting: Setting, shard: Shard | None = None
) -> None:
    """Computes everything in `result`, on the current stream, without synchronising.

    Args:
        segment: R >= 1 rows.
        weight: ``[V, D]``, last dimension contiguous, dtype of ``segment.hidden`` (float32, bfloat16 or float16).
        result: overwritten; its gradients are made where they are tensors. Dtypes: that of hidden or float32.
        setting: see `Setting`.
        shard: which classes `weight` holds, where several ranks share the vocabulary (then V may be 0, ``d_hidden`` is
            this rank's part of it and should be float32); None for all of them.
    """
    dtype = segment.hidden.dtype
    if setting.fused is None:
        setting = replace(setting, fused=dtype != torch.float32)
        if setting.fused and not aligned(segment.hidden, weight):
            _run_padded(segment, weight, result, setting, shard)
            return
    rows, width = segment.hidden.shape
    classes = weight.shape[0]
    device = weight.device
    fused = bool(setting.fused)
    grad = result.d_hidden is not None or result.d_weight is not None
    tiles = setting.tiles or TABLE[architecture(device)]
    block_classes = tiles.forward.classes if fused else BLOCK_CLASSES
    chunks = plan_chunks(
        rows,
        classes if shard is None else shard.share,  # ranks must agree on the chunks
        width,
        dtype,
        fused=fused,
        block_classes=block_classes,
        # with a shard by what all ranks know, whatever this one's own part of the weight is to get
        weight_sum=dtype == torch.bfloat16 and (shard is not None or result.d_weight is not None),
        chunk_bytes=setting.chunk_bytes,
    )
    stride = row_stride(classes)
    e = torch.empty(chunks.rows, stride, dtype=dtype, device=device) if grad and classes else None
    z = None
    if not fused and classes:
        same = e is not None and dtype == torch.float32
        z = e if same else torch.empty(chunks.rows, stride, dtype=torch.float32, device=device)
    total = (
        WeightSum(result.d_weight, dtype, chunks, rows, tiles)
        if e is not None and result.d_weight is not None
        else None
    )
    if result.d_hidden is not None and not classes:
        result.d_hidden.zero_()

    logit = single_logits(segment.hidden, weight, segment.target.unsqueeze(1), shard).squeeze(1)
    anchors = Anchors(logit, logit * LOG2E.value, logit + overflow_gap(dtype))
    for low in range(0, rows, chunks.rows):
        high = min(low + chunks.rows, rows)
        cut = slice(low, high)
        hidden, target = segment.hidden[cut], segment.target[cut]
        part = anchors.part(low, high)
        states = result.states.part(low, high)
        weights = replace(segment.weights, share=segment.weights.share[cut])
        partials = Partials.empty(-(-classes // block_classes), high - low, device)
        e_part = None if e is None else e[: high - low]

        forward = _Forward(hidden, weight, part, partials, tiles, None if z is None else z[: high - low, :classes])
        if classes:
            forward.first(e_part)
        everything = whole_vocabulary(partials, part, shard)
        combine(everything, part, states, target, segment.hard[cut], weights, shard.total if shard else classes, dtype)
        if e_part is not None:
            forward.again(e_part, states.redo)

        token = touched_tokens(
            result.states.prediction,
            segment.target,
            segment.reach,
            segment.hard,
            low,
            high - low,
            segment.negatives,
        )
        touch_up(
            e_part,
            token,
            single_logits(hidden, weight, token, shard),
            part.logit,
            target,
            states,
            weights,
            segment.negatives,
            result.tcl[cut],
            result.het[cut],
            shard.first if shard else 0,
            classes,
        )
        if e_part is None:
            continue

        e_part = e_part[:, :classes]
        live = None
        if setting.gradient_filter > 0 and fused:
            live = live_tiles(
                partials,
                states,
                part.logit,
                target,
                own_tokens(token, shard),
                setting.gradient_filter,
                tiles.forward.rows,
                tiles.forward.classes,
                own_tokens(target, shard),
            )
        if result.d_hidden is not None:
            out = result.d_hidden[cut]
            if live is not None:
                filtered_d_hidden(e_part, weight, states.scale, out, live, tiles.d_hidden)
            else:
                raw = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
                scale_rows(product(e_part, weight, raw), states.scale, out)
        if total is not None:
            total.add(e_part, scale_rows(hidden, states.scale, torch.empty_like(hidden), total.raise_by), live)


def _run_padded(segment: Segment, weight: Tensor, result: SegmentResult, setting: Setting, shard: Shard | None) -> None:
    """`run_segment` on copies whose rows are whole multiples of 16 bytes: one more pass over the operands and over the
    gradients, where products of unaligned rows would be slow, all three of them."""
    width = weight.shape[1]
    wide = -(-width // _ALIGNED_FEATURES) * _ALIGNED_FEATURES

    def padded(x: Tensor) -> Tensor:
        copy = x.new_zeros(x.shape[0], wide)
        copy[:, :width] = x
        return copy

    def room(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.new_empty(x.shape[0], wide)

    inner = replace(result, d_hidden=room(result.d_hidden), d_weight=room(result.d_weight))
    run_segment(replace(segment, hidden=padded(segment.hidden)), padded(weight), inner, setting, shard)
    for out, found in ((result.d_hidden, inner.d_hidden), (result.d_weight, inner.d_weight)):
        if out is not None and found is not None:
            out.copy_(found[:, :width])


@dataclass(frozen=True)
class _Forward:
    """E and the statistics of one chunk, by the fused product or from written logits."""

    hidden: Tensor
    weight: Tensor
    anchors: Anchors
    partials: Partials
    tiles: Tiles
    z: Tensor | None

    def first(self, e: Tensor | None) -> None:
        if self.z is not None:
            product(self.hidden, self.weight.t(), self.z)
            logits_statistics(self.z, self.anchors, self.partials)
            return
        blocks = -(-self.hidden.shape[0] // self.tiles.forward.rows)
        every = torch.arange(blocks, dtype=torch.int32, device=self.weight.device)
        count = torch.full((), blocks, dtype=torch.int32, device=self.weight.device)
        self._launch(e, every, count)

    def again(self, e: Tensor, redo: Tensor) -> None:
        if self.z is not None:
            logits_exp(self.z, self.anchors, e)
            return
        self._launch(e, *redo_list(redo, self.tiles.forward.rows))

    def _launch(self, e: Tensor | None, blocks: Tensor, count: Tensor) -> None:
        tiles = blocks.shape[0] * self.partials.sum.shape[0]
        config = self.tiles.forward
        grid = programs(config, tiles, self.weight.device)
        anchored_gemm(self.hidden, self.weight, e, self.anchors, self.partials, blocks, count, config, grid)
