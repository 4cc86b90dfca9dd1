"""The target-anchored one-pass algorithm (docs/kernels.md) in plain PyTorch, for the CPU and for GPUs.

A block of rows is processed tile by tile along the vocabulary: a product gives a tile of logits, which is reduced and
exponentiated against the row's own target logit while it is still in the cache, and is stored as E = exp(z - z[y]) in
the dtype of the operands. The block then holds the unnormalised softmax of its rows; a handful of entries per row is
replaced for TCL, HET and the target, and two products read it. Nothing is computed twice, except a block in which
some row's maximum lies so far above its target that the sum would overflow: it is recomputed with the maximum as
anchor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ntpseg.losses import products
from ntpseg.losses.backends import RowsResult, gradient_dtype
from ntpseg.losses.compaction import Rows
from ntpseg.losses.options import LossOptions
from ntpseg.losses.products import Tiling
from ntpseg.losses.vocab_parallel import Shard
from ntpseg.ops import loss_cpu

# exp of this times the largest vocabulary, times the ratio of a hard token's weight to its row's, still fits float32
_OVERFLOW_GAP = {torch.float64: 600.0, torch.float32: 60.0}


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
    count, device, work = len(rows.target), rows.hidden.device, rows.row_weight.dtype
    matrices = weight.unsqueeze(0) if weight.dim() == 2 else weight
    result_dtype = gradient_dtype(weight.dtype)
    prediction = torch.full((count,), -1, dtype=torch.int64, device=device)
    nll, margin, tcl, het, lse = torch.zeros(5, count, dtype=work, device=device)
    # parts of one gradient that ranks add up are not rounded before they are added
    d_hidden_dtype = result_dtype if shard.group is None else work
    d_hidden = torch.empty(rows.hidden.shape, dtype=d_hidden_dtype, device=device) if hidden_grad else None
    d_weight = torch.empty(matrices.shape, dtype=work, device=device) if weight_grad else None
    result = RowsResult(prediction, nll, margin, tcl, het, lse, d_hidden, d_weight)

    tiling = Tiling.choose(count, shard.classes_per_rank, weight.dtype, device, options.chunk_bytes)
    buffer = tiling.allocate(matrices.shape[1]) if hidden_grad or weight_grad else None
    for matrix, (start, stop) in enumerate(rows.segments):
        if d_weight is not None and (start == stop or options.gradient_filter > 0):
            d_weight[matrix].zero_()
        # in time order: the negatives of a block's first rows are what the block before has predicted
        for low in range(start, stop, tiling.block_rows):
            part = slice(low, min(low + tiling.block_rows, stop))
            block = Block.make(rows, part, matrices[matrix], options.softcap, buffer, tiling, shard)
            _run_block(block, result, matrix, options, first=low == start)

    if d_hidden is not None:
        d_hidden = shard.all_reduce_sum(d_hidden).to(result_dtype)
    buffer = block = None  # type: ignore[assignment]  # before the copy in another dtype
    if d_weight is not None:
        d_weight = d_weight.reshape(weight.shape).to(result_dtype)
    return RowsResult(prediction, nll, margin, tcl, het, lse, d_hidden, d_weight)


@dataclass(frozen=True)
class Block:
    """Some rows of one weight matrix, C of them, and where their exponentials go.

    Attributes:
        part: which of all rows.
        hidden: ``[C, D]`` in the dtype of the products.
        weight: ``[V, D]``, the classes of `shard`.
        valid: ``[C]`` bool, false on padding rows.
        target: ``[C]`` int64, 0 on padding rows.
        target_logit: ``[C]`` work, taken as exact: the product may round it differently, and the margin of a right
            prediction must be exactly 0.
        row_weight, num_negatives, hard_tokens, entry_weight: see `ntpseg.losses.compaction.Rows`.
        softcap: see `LossOptions`; `target_logit` and all logits below are those after it.
        e: ``[C, V]``, or None where only reductions are wanted.
        tiling: sizes and dtypes.
        shard: the classes that `weight` holds.
    """

    part: slice
    hidden: Tensor
    weight: Tensor
    valid: Tensor
    target: Tensor
    target_logit: Tensor
    row_weight: Tensor
    num_negatives: Tensor
    hard_tokens: Tensor
    entry_weight: Tensor
    softcap: float | None
    e: Tensor | None
    tiling: Tiling
    shard: Shard

    @staticmethod
    def make(
        rows: Rows,
        part: slice,
        weight: Tensor,
        softcap: float | None,
        buffer: Tensor | None,
        tiling: Tiling,
        shard: Shard,
    ) -> Block:
        """The rows `part`; `buffer` has room for their exponentials."""
        hidden, target = rows.hidden[part].to(tiling.product_dtype), rows.target[part].clamp_min(0)
        work = rows.row_weight.dtype
        return Block(
            part=part,
            hidden=hidden,
            weight=weight,
            valid=rows.target[part] >= 0,
            target=target,
            target_logit=capped(token_logits(hidden, weight, target.unsqueeze(1), work, shard).squeeze(1), softcap),
            row_weight=rows.row_weight[part],
            num_negatives=rows.num_negatives[part],
            hard_tokens=rows.hard_tokens[part],
            entry_weight=rows.entry_weight,
            softcap=softcap,
            e=None if buffer is None else buffer[: len(target)],
            tiling=tiling,
            shard=shard,
        )


def _run_block(block: Block, result: RowsResult, matrix: int, options: LossOptions, *, first: bool) -> None:
    """Fills a block's rows of `result` and adds to the weight's gradient; `first` of its matrix overwrites that."""
    z_y, limit = block.target_logit, _OVERFLOW_GAP[block.target_logit.dtype]
    stats = exponentials(block, z_y)
    if bool((stats.row_max > limit).any()):
        stats = exponentials(block, torch.where(stats.row_max > limit, z_y + stats.row_max, z_y))
    shift = stats.anchor - z_y
    log_sum = stats.row_sum.log()
    part, valid = block.part, block.valid
    result.prediction[part] = torch.where(valid, stats.argmax, -1)
    result.margin[part] = torch.where(valid, stats.row_max + shift, 0.0)
    result.nll[part] = torch.where(valid, log_sum + shift, 0.0)
    result.lse[part] = torch.where(valid, log_sum + stats.anchor, 0.0)

    terms = contrastive_terms(block, result.prediction, options)
    result.tcl[part] = torch.where(valid, terms.tcl, 0.0)
    result.het[part] = terms.het
    if block.e is None:
        return
    row_scale, het_only = logit_gradient(block, stats, terms, result.lse[part], options)
    classes = None
    if options.gradient_filter > 0:
        # rows in units of one have no probabilities: all that they hold is kept
        unit = stats.row_sum.index_fill(0, het_only, torch.finfo(stats.row_sum.dtype).tiny)
        classes = products.classes_above(block.e, unit, options.gradient_filter, block.tiling)
    hidden, weight = block.hidden, block.weight
    if result.d_hidden is not None:
        products.hidden_gradient(block.e, hidden, weight, row_scale, result.d_hidden[part], classes)
    if result.d_weight is not None:
        # a filtered sum adds at some classes only: it starts from zeros instead
        add = not first or classes is not None
        d_weight = result.d_weight[matrix]
        products.weight_gradient(block.e, hidden, weight, row_scale, d_weight, classes, block.tiling, add=add)


@dataclass(frozen=True)
class RowStats:
    """Reductions of one block; all ``[C]``, work dtype but for `argmax`.

    Attributes:
        anchor: what was subtracted from the row's logits.
        row_max: max z - anchor.
        argmax: int64, the lowest class that has it.
        row_sum: S, the sum of exp(z - anchor).
    """

    anchor: Tensor
    row_max: Tensor
    argmax: Tensor
    row_sum: Tensor


def exponentials(block: Block, anchor: Tensor) -> RowStats:
    """Writes ``exp(z - anchor)`` to ``block.e`` (unless None) and reduces it on the way; `anchor` is ``[C]``.

    With a softcap what is written is multiplied by the derivative of the capped logit already: the sums are taken
    before, and the gradients are all that ``block.e`` is read for afterwards.
    """
    hidden, weight, e, shard = block.hidden, block.weight, block.e, block.shard
    rows, classes, work = len(hidden), len(weight), anchor.dtype
    row_max = torch.full((rows,), -torch.inf, dtype=work, device=hidden.device)
    argmax = torch.zeros(rows, dtype=torch.int64, device=hidden.device)
    row_sum = torch.zeros(rows, dtype=work, device=hidden.device)
    column, owned = shard.local_index(block.target)
    if classes and block.softcap is None and loss_cpu.serves_blocks(hidden, weight):
        column = torch.where(owned, column, -1)
        row_max, argmax, row_sum = loss_cpu.block_exponentials(hidden, weight, anchor, column, block.target_logit, e)
        return RowStats(anchor, *shard.all_reduce_max(row_max, argmax), shard.all_reduce_sum(row_sum))

    native = block.softcap is None and loss_cpu.serves_tiles(hidden)
    in_place = e if native else None
    # the native pass reads memory as fast as it comes: one product over all classes suits it better than many
    step = block.tiling.tile_classes if in_place is None else max(classes, 1)
    scratch = torch.empty(rows * min(step, classes) if in_place is None else 0, dtype=work, device=hidden.device)
    target_tile = torch.where(owned, column // step, -1)
    for tile, low in enumerate(range(0, classes, step)):
        high = min(low + step, classes)
        out = scratch[: rows * (high - low)].view(rows, high - low) if in_place is None else in_place[:, low:high]
        z = capped(products.logits(hidden, weight[low:high], out=out), block.softcap)
        here = (target_tile == tile).nonzero().squeeze(1)
        z[here, column[here] - low] = block.target_logit[here]
        if native:
            loss_cpu.exponentials_(z, anchor, row_max, argmax, row_sum, low)
            continue
        damping = cap_slope(z, block.softcap)
        gap = z.sub_(anchor.unsqueeze(1))
        tile_max = gap.amax(1)
        higher = (tile_max > row_max).nonzero().squeeze(1)  # strictly: ties stay with the lower class
        argmax[higher] = gap[higher].argmax(1) + low
        row_max = torch.maximum(row_max, tile_max)
        row_sum += gap.exp_().sum(1)
        if e is not None:
            e[:, low:high].copy_(gap if damping is None else gap.mul_(damping))
    return RowStats(anchor, *shard.all_reduce_max(row_max, argmax), shard.all_reduce_sum(row_sum))


def token_logits(hidden: Tensor, weight: Tensor, token: Tensor, work: torch.dtype, shard: Shard) -> Tensor:
    """``[C, q]``: logits of `token` ``[C, q]``, wherever they live."""
    column, owned = shard.local_index(token)
    if not shard.count:
        return shard.all_reduce_sum(torch.zeros(token.shape, dtype=work, device=token.device))
    return shard.all_reduce_sum(products.indexed_dot(hidden, weight, column, work).masked_fill(~owned, 0.0))


def capped(z: Tensor, softcap: float | None) -> Tensor:
    """``softcap * tanh(z / softcap)``, in place; `z` itself without a softcap."""
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def cap_slope(z: Tensor, softcap: float | None) -> Tensor | None:
    """The derivative ``1 - (z / softcap)^2`` of `capped` at capped logits `z`; None without a softcap."""
    return None if softcap is None else 1 - (z / softcap).square_()


@dataclass(frozen=True)
class ContrastiveTerms:
    """TCL and HET of each row, and their gradients at the few classes that they read.

    Attributes:
        token: ``[C, m + h]`` int64, 0 where there is none.
        slope: ``[C, m + h]``, `cap_slope` of their logits; None without a softcap.
        tcl_grad: ``[C, m]``, d tcl / d z[negative].
        het_grad: ``[C, h]``, d het / d z[hard token].
        tcl, het: ``[C]``.
    """

    token: Tensor
    slope: Tensor | None
    tcl_grad: Tensor
    het_grad: Tensor
    tcl: Tensor
    het: Tensor


def contrastive_terms(block: Block, prediction: Tensor, options: LossOptions) -> ContrastiveTerms:
    """Negatives and hard tokens of one block; their logits come from dot products, not from the rounded block.

    Args:
        block: C rows.
        prediction: ``[R]`` int64 of all rows, known up to the last of these.
        options: reads negatives and temperature.
    """
    device, target, z_y = prediction.device, block.target, block.target_logit
    back = torch.arange(1, options.negatives + 1, device=device)
    earlier = torch.arange(block.part.start, block.part.stop, device=device).unsqueeze(1) - back
    negative = prediction[earlier.clamp_min(0)]
    exists = (back <= block.num_negatives.unsqueeze(1)) & (negative != target.unsqueeze(1)) & (negative >= 0)
    hard = block.hard_tokens
    token = torch.cat([torch.where(exists, negative, 0), hard.clamp_min(0)], 1)
    z = capped(token_logits(block.hidden, block.weight, token, z_y.dtype, block.shard), block.softcap)
    gap = (z - z_y.unsqueeze(1)) / options.temperature
    gap = gap.masked_fill(~torch.cat([exists, hard >= 0], 1), -torch.inf)
    negative_gap, hard_gap = gap.split([options.negatives, hard.shape[1]], 1)
    one = negative_gap.new_zeros(len(gap), 1)  # the zero is the 1 in log(1 + sum)
    tcl = torch.cat([negative_gap, one], 1).logsumexp(1)
    return ContrastiveTerms(
        token=token,
        slope=cap_slope(z, block.softcap),
        tcl_grad=torch.exp(negative_gap - tcl.unsqueeze(1)) / options.temperature,
        het_grad=torch.sigmoid(hard_gap) / options.temperature,
        tcl=tcl,
        het=torch.logaddexp(hard_gap, torch.zeros_like(hard_gap)).sum(1),
    )


def logit_gradient(
    block: Block, stats: RowStats, terms: ContrastiveTerms, lse: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """Turns ``block.e`` into logit gradients in units of a row scale: ``dz = row_scale * e``.

    Returns:
        The row scale ``[C]``, and int64 ``[n]``, the rows that no class but their hard tokens and target counts in.
    """
    e, row_weight = block.e, block.row_weight
    assert e is not None
    tcl_grad = terms.tcl_grad * (options.tcl_weight * row_weight).unsqueeze(1)
    het_grad = terms.het_grad * (options.het_weight * block.entry_weight)
    token_grad = torch.cat([tcl_grad, het_grad], 1)
    target_grad = -(row_weight + token_grad.sum(1))
    ce_coeff = row_weight * (1 + 2 * options.z_loss * lse) if options.z_loss else row_weight
    row_scale = ce_coeff / stats.row_sum

    # a hard token on a row without any CE weight: nothing of E counts there, and gradients are in units of one
    het_only = ((row_scale == 0) & (target_grad != 0)).nonzero().squeeze(1)
    e[het_only] = 0
    row_scale[het_only] = 1
    if not block.shard.count:
        return row_scale, het_only
    target_e = torch.exp(block.target_logit - stats.anchor)
    target_e[het_only] = 0
    divisor = row_scale.masked_fill(row_scale == 0, 1.0)
    if terms.slope is not None:
        token_grad = token_grad * terms.slope
    column, owned = block.shard.local_index(terms.token)
    products.scatter_add_(e, column, (token_grad / divisor.unsqueeze(1)).masked_fill(~owned, 0.0))
    # the target's entry is formed whole before it is rounded: 1 - S cancels where the model is sure and right
    column, owned = block.shard.local_index(block.target)
    row = owned.nonzero().squeeze(1)
    whole = target_e + target_grad / divisor
    slope = cap_slope(block.target_logit, block.softcap)
    e[row, column[row]] = (whole if slope is None else whole * slope)[row].to(e.dtype)
    return row_scale, het_only
