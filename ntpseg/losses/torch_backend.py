"""The target-anchored one-pass algorithm (DESIGN, section 1) in plain PyTorch, for the CPU and for GPUs.

A block of rows is processed tile by tile along the vocabulary: a product gives a tile of logits, which is reduced and
exponentiated against the row's own target logit while it is still in the cache, and is stored as E = exp(z - z[y]) in
the dtype of the operands. The block then holds the unnormalised softmax of its rows; a handful of entries per row is
touched up for TCL, HET and the target, and two products read it. Nothing is computed twice, except a block in which
some row's maximum lies so far above its target that the sum would overflow: it is redone with the maximum as anchor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ntpseg.losses import products
from ntpseg.losses.backends import RowsResult, gradient_dtype
from ntpseg.losses.compaction import Rows
from ntpseg.losses.options import LossOptions
from ntpseg.losses.vocab_parallel import Shard
from ntpseg.ops import loss_cpu

# exp of this times the largest vocabulary, times the ratio of a hard token's weight to its row's, still fits float32
_HIGHEST_GAP = {torch.float64: 600.0, torch.float32: 60.0}


def rows_loss(
    rows: Rows,
    weight: Tensor,
    options: LossOptions,
    *,
    hidden_grad: bool,
    weight_grad: bool,
    shard: Shard | None = None,
) -> RowsResult:
    """See `ntpseg.losses.backends` for the contract; `shard` says which classes `weight` holds, all by default."""
    shard = shard or Shard(0, weight.shape[-2], weight.shape[-2])
    count, device, work = len(rows.target), rows.hidden.device, rows.share.dtype
    matrices = weight.unsqueeze(0) if weight.dim() == 2 else weight
    kept = gradient_dtype(weight.dtype)
    prediction = torch.full((count,), -1, dtype=torch.int64, device=device)
    nll, margin, tcl, het, lse = torch.zeros(5, count, dtype=work, device=device)
    summed = kept if shard.group is None else work
    d_hidden = torch.empty(rows.hidden.shape, dtype=summed, device=device) if hidden_grad else None
    d_weight = torch.empty(matrices.shape, dtype=work, device=device) if weight_grad else None

    grid = products.Grid.choose(count, shard.classes_per_rank, weight.dtype, device, options.chunk_bytes)
    store = grid.block(matrices.shape[1]) if hidden_grad or weight_grad else None
    for matrix, (start, stop) in enumerate(rows.segments):
        if d_weight is not None and (start == stop or options.gradient_filter > 0):
            d_weight[matrix].zero_()
        for low in range(start, stop, grid.rows):
            part = slice(low, min(low + grid.rows, stop))
            hidden, head = rows.hidden[part].to(grid.product), matrices[matrix]
            real = rows.target[part] >= 0
            target = rows.target[part].clamp_min(0)
            block = None if store is None else store[: len(target)]
            z_y = dots(hidden, head, target.unsqueeze(1), work, shard).squeeze(1)

            found = exponentials(hidden, head, target, z_y, z_y, block, grid, shard)
            if bool((found.top > _HIGHEST_GAP[work]).any()):
                anchor = torch.where(found.top > _HIGHEST_GAP[work], z_y + found.top, z_y)
                found = exponentials(hidden, head, target, z_y, anchor, block, grid, shard)
            shift = found.anchor - z_y
            log_total = found.total.log()
            prediction[part] = torch.where(real, found.best, -1)
            margin[part] = torch.where(real, found.top + shift, 0.0)
            nll[part] = torch.where(real, log_total + shift, 0.0)
            lse[part] = torch.where(real, log_total + found.anchor, 0.0)

            touch = touches(hidden, head, z_y, target, prediction, rows, part, options, shard)
            tcl[part] = torch.where(real, touch.tcl, 0.0)
            het[part] = touch.het
            if block is None:
                continue
            unit = touch_up(block, found, touch, target, z_y, lse[part], rows, part, options, shard)
            kept_classes = None
            if options.gradient_filter > 0:
                kept_classes = products.classes_above(block, found.total, options.gradient_filter, grid)
            if d_hidden is not None:
                products.hidden_gradient(block, hidden, head, unit, d_hidden[part], kept_classes)
            if d_weight is not None:
                fresh = low == start and kept_classes is None
                products.weight_gradient(block, hidden, head, unit, d_weight[matrix], kept_classes, grid, add=not fresh)

    if d_hidden is not None:
        d_hidden = shard.all_reduce_sum(d_hidden).to(kept)
    store = block = None  # before the copy in another dtype
    if d_weight is not None:
        d_weight = d_weight.reshape(weight.shape).to(kept)
    return RowsResult(prediction, nll, margin, tcl, het, lse, d_hidden, d_weight)


@dataclass(frozen=True)
class Exponentials:
    """Reductions of one block; all ``[C]``, work dtype but for `best`."""

    anchor: Tensor  # what was subtracted from the row's logits
    top: Tensor  # max z - anchor
    best: Tensor  # int64 arg-max
    total: Tensor  # S, the sum of exp(z - anchor)


def exponentials(
    hidden: Tensor,
    matrix: Tensor,
    target: Tensor,
    z_y: Tensor,
    anchor: Tensor,
    block: Tensor | None,
    grid: products.Grid,
    shard: Shard,
) -> Exponentials:
    """Writes ``exp(z - anchor)`` of one block to `block` (unless None) and reduces it on the way.

    Args:
        hidden: ``[C, D]`` rows; matrix: ``[V, D]``.
        target: ``[C]`` int64; z_y: ``[C]`` its logit, taken as exact (the product may round it differently, and the
            margin of a right prediction must be exactly 0).
        anchor: ``[C]``, subtracted from the logits.
        block: ``[C, V]`` or None.
        grid: tile sizes.
        shard: the classes that `matrix` holds.
    """
    rows, classes, work = len(hidden), len(matrix), z_y.dtype
    top = torch.full((rows,), -torch.inf, dtype=work, device=hidden.device)
    best = torch.zeros(rows, dtype=torch.int64, device=hidden.device)
    total = torch.zeros(rows, dtype=work, device=hidden.device)
    column, owned = shard.local_index(target)
    if classes and loss_cpu.serves_blocks(hidden, matrix):
        column = torch.where(owned, column, -1)
        top, best, total = loss_cpu.block_exponentials(hidden, matrix, anchor, column, z_y, block)
        return Exponentials(anchor, *shard.all_reduce_max(top, best), shard.all_reduce_sum(total))

    native = loss_cpu.serves_tiles(hidden)
    # the native pass reads memory as fast as it comes: one product over all classes suits it better than many
    step = max(classes, 1) if native and block is not None else grid.classes
    room = torch.empty(rows * min(step, classes) if block is None or not native else 0, dtype=work, device=z_y.device)
    home = torch.where(owned, column // step, -1)
    for tile, low in enumerate(range(0, classes, step)):
        high = min(low + step, classes)
        out = room[: rows * (high - low)].view(rows, high - low) if block is None or not native else block[:, low:high]
        z = products.logits(hidden, matrix[low:high], out=out)
        here = (home == tile).nonzero().squeeze(1)
        z[here, column[here] - low] = z_y[here]
        if native:
            loss_cpu.exponentials_(z, anchor, top, best, total, low)
            continue
        gap = z.sub_(anchor.unsqueeze(1))
        tile_top = gap.amax(1)
        higher = (tile_top > top).nonzero().squeeze(1)  # strictly: ties stay with the lower class
        best[higher] = gap[higher].argmax(1) + low
        top = torch.maximum(top, tile_top)
        total += gap.exp_().sum(1)
        if block is not None:
            block[:, low:high].copy_(gap)
    top, best = shard.all_reduce_max(top, best)
    return Exponentials(anchor, top, best, shard.all_reduce_sum(total))


def dots(hidden: Tensor, matrix: Tensor, token: Tensor, work: torch.dtype, shard: Shard) -> Tensor:
    """``[C, q]``: logits of `token` ``[C, q]``, wherever they live."""
    column, owned = shard.local_index(token)
    if not shard.count:
        return shard.all_reduce_sum(torch.zeros(token.shape, dtype=work, device=token.device))
    return shard.all_reduce_sum(products.row_dots(hidden, matrix, column, work).masked_fill(~owned, 0.0))


@dataclass(frozen=True)
class Touches:
    """The few classes of each row that TCL and HET reach."""

    token: Tensor  # [C, m + h] int64, 0 where there is none
    negative_pull: Tensor  # [C, m] d tcl / d z[negative]
    hard_pull: Tensor  # [C, h] d het / d z[hard token]
    tcl: Tensor  # [C]
    het: Tensor  # [C]


def touches(
    hidden: Tensor,
    matrix: Tensor,
    z_y: Tensor,
    target: Tensor,
    prediction: Tensor,
    rows: Rows,
    part: slice,
    options: LossOptions,
    shard: Shard,
) -> Touches:
    """Negatives and hard tokens of one block; their logits come from dot products, not from the rounded block."""
    back = torch.arange(1, options.negatives + 1, device=hidden.device)
    earlier = torch.arange(part.start, part.stop, device=hidden.device).unsqueeze(1) - back
    negative = prediction[earlier.clamp_min(0)]
    exists = (back <= rows.reach[part].unsqueeze(1)) & (negative != target.unsqueeze(1)) & (negative >= 0)
    hard = rows.het[part]
    token = torch.cat([torch.where(exists, negative, 0), hard.clamp_min(0)], 1)
    gap = (dots(hidden, matrix, token, z_y.dtype, shard) - z_y.unsqueeze(1)) / options.temperature
    gap = gap.masked_fill(~torch.cat([exists, hard >= 0], 1), -torch.inf)
    near, far = gap.split([options.negatives, hard.shape[1]], 1)
    tcl = torch.cat([near, near.new_zeros(len(near), 1)], 1).logsumexp(1)  # the zero is the 1 in log(1 + sum)
    return Touches(
        token=token,
        negative_pull=torch.exp(near - tcl.unsqueeze(1)) / options.temperature,
        hard_pull=torch.sigmoid(far) / options.temperature,
        tcl=tcl,
        het=torch.logaddexp(far, torch.zeros_like(far)).sum(1),
    )


def touch_up(
    block: Tensor,
    found: Exponentials,
    touch: Touches,
    target: Tensor,
    z_y: Tensor,
    lse: Tensor,
    rows: Rows,
    part: slice,
    options: LossOptions,
    shard: Shard,
) -> Tensor:
    """Turns exponentials into logit gradients in units of the returned ``[C]``: ``dz = unit * block``."""
    share = rows.share[part]
    near = touch.negative_pull * (options.tcl_weight * share).unsqueeze(1)
    far = touch.hard_pull * (options.het_weight * rows.het_share)
    pull = torch.cat([near, far], 1)
    on_target = -(share + pull.sum(1))
    softmax_scale = share * (1 + 2 * options.z_loss * lse) if options.z_loss else share
    unit = softmax_scale / found.total

    bare = ((unit == 0) & (on_target != 0)).nonzero().squeeze(1)  # a hard token on a row without any CE weight
    block[bare] = 0
    unit[bare] = 1
    if not shard.count:
        return unit
    own = torch.exp(z_y - found.anchor)
    own[bare] = 0
    divisor = unit.masked_fill(unit == 0, 1.0)
    column, owned = shard.local_index(touch.token)
    products.add_at_(block, column, (pull / divisor.unsqueeze(1)).masked_fill(~owned, 0.0))
    # the target's entry is formed whole before it is rounded: 1 - S cancels where the model is sure and right
    column, owned = shard.local_index(target)
    row = owned.nonzero().squeeze(1)
    block[row, column[row]] = (own + on_target / divisor)[row].to(block.dtype)
    return unit
