"""The chunk loop: row results and gradients of one weight matrix, from the kernels of this folder. No autograd.

Per chunk: fused product -> combination -> list of rows to redo -> the same product over that list (normally empty, and
then a launch that returns at once: nothing is read back to the host) -> touch-up -> two products that read E.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ntpseg.kernels.anchored_gemm import anchored_gemm
from ntpseg.kernels.chunks import plan_chunks
from ntpseg.kernels.combine import Weights, combine, overflow_gap, redo_list
from ntpseg.kernels.dialect import LOG2E
from ntpseg.kernels.filtered import filtered_d_hidden, filtered_d_weight
from ntpseg.kernels.live_tiles import LiveTiles, live_tiles
from ntpseg.kernels.logits_pass import BLOCK_CLASSES, logits_exp, logits_statistics
from ntpseg.kernels.pair_logits import pair_logits
from ntpseg.kernels.partials import Anchors, Partials, RowStates
from ntpseg.kernels.products import add_product, product
from ntpseg.kernels.scale_rows import scale_rows
from ntpseg.kernels.table import TABLE, Tiles, architecture, programs
from ntpseg.kernels.touch_up import touch_up, touched_tokens


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
        fused: force (True) or forbid (False) the fused product; None chooses by dtype and alignment.
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


def run_segment(segment: Segment, weight: Tensor, result: SegmentResult, setting: Setting) -> None:
    """Computes everything in `result`, on the current stream, without synchronising.

    Args:
        segment: R >= 1 rows.
        weight: ``[V, D]``, last dimension contiguous, dtype of ``segment.hidden`` (float32, bfloat16 or float16).
        result: overwritten; its gradients are made where they are tensors. Dtypes: that of hidden or float32.
        setting: see `Setting`.
    """
    rows, width = segment.hidden.shape
    classes = weight.shape[0]
    dtype = segment.hidden.dtype
    device = weight.device
    fused = setting.fused
    if fused is None:
        fused = dtype != torch.float32 and aligned(segment.hidden, weight)
    grad = result.d_hidden is not None or result.d_weight is not None
    tiles = setting.tiles or TABLE[architecture(device)]
    block_classes = tiles.forward.classes if fused else BLOCK_CLASSES
    chunks = plan_chunks(
        rows,
        classes,
        width,
        dtype,
        fused=fused,
        block_classes=block_classes,
        weight_grad=result.d_weight is not None,
        chunk_bytes=setting.chunk_bytes,
    )
    e = torch.empty(chunks.rows, chunks.stride, dtype=dtype, device=device) if grad else None
    z = None
    if not fused:
        same = e is not None and dtype == torch.float32
        z = e if same else torch.empty(chunks.rows, chunks.stride, dtype=torch.float32, device=device)
    total = _WeightSum.start(result.d_weight, dtype, chunks.count, rows)

    logit = pair_logits(segment.hidden, weight, segment.target.unsqueeze(1)).squeeze(1)
    anchors = Anchors(logit, logit * LOG2E.value, logit + overflow_gap(dtype))
    for low in range(0, rows, chunks.rows):
        high = min(low + chunks.rows, rows)
        cut = slice(low, high)
        hidden = segment.hidden[cut]
        part = anchors.part(low, high)
        states = result.states.part(low, high)
        weights = replace(segment.weights, share=segment.weights.share[cut])
        partials = Partials.empty(-(-classes // block_classes), high - low, device)
        e_part = None if e is None else e[: high - low]

        forward = _Forward(hidden, weight, part, partials, tiles, None if z is None else z[: high - low, :classes])
        forward.first(e_part)
        combine(partials, part, states, segment.target[cut], segment.hard[cut], weights, classes, dtype)
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
        gaps = pair_logits(hidden, weight, token)
        target = segment.target[cut]
        touch_up(
            e_part,
            token,
            gaps,
            part.logit,
            target,
            states,
            weights,
            segment.negatives,
            result.tcl[cut],
            result.het[cut],
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
                token,
                setting.gradient_filter,
                tiles.forward.rows,
                tiles.forward.classes,
            )
        if result.d_hidden is not None:
            out = result.d_hidden[cut]
            if live is not None:
                filtered_d_hidden(e_part, weight, states.scale, out, live, tiles.d_hidden)
            else:
                raw = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
                scale_rows(product(e_part, weight, raw), states.scale, out)
        if total is not None:
            scaled = scale_rows(hidden, states.scale, torch.empty_like(hidden), total.raise_by)
            total.add(e_part, scaled, live, tiles)
    if total is not None:
        total.finish()


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


class _WeightSum:
    """The weight's gradient over the chunks: fp32 where there are several, the result itself where there is one."""

    def __init__(self, out: Tensor, total: Tensor, raise_by: float) -> None:
        self.out, self.total, self.raise_by = out, total, raise_by
        self.empty = True

    @staticmethod
    def start(out: Tensor | None, dtype: torch.dtype, chunks: int, rows: int) -> _WeightSum | None:
        if out is None:
            return None
        direct = chunks == 1 or out.dtype == torch.float32
        total = out if direct else torch.empty_like(out, dtype=torch.float32)
        # shares are about 1 / R: float16 would flush them to zero
        return _WeightSum(out, total, float(1 << (rows - 1).bit_length()) if dtype == torch.float16 else 1.0)

    def add(self, e: Tensor, scaled: Tensor, live: LiveTiles | None, tiles: Tiles) -> None:
        if live is not None:
            filtered_d_weight(e, scaled, self.total, live, tiles.d_weight, accumulate=not self.empty)
        elif self.empty:
            product(e.t(), scaled, self.total)
        else:
            add_product(self.total, e.t(), scaled)
        self.empty = False

    def finish(self) -> None:
        if self.raise_by != 1.0:
            self.total.mul_(1.0 / self.raise_by)
        if self.total is not self.out:
            self.out.copy_(self.total)
