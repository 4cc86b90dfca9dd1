"""The matrix products and passes over a block of logits, and what each device does best for them."""

from __future__ import annotations

import torch
from torch import Tensor

# Blocks stay within the share of a last-level cache on a CPU; a GPU needs 2048 rows to fill its products.
_CPU_BLOCK_BYTES = 64 << 20
_GPU_BLOCK_BYTES = 1 << 30
_GPU_BLOCK_ROWS = 2048
_CPU_BLOCK_ROWS = 64
# The product of one block for the weight's gradient is formed in slices of this size before it is added.
_SLICE_BYTES = 256 << 20


def rows_per_block(classes: int, work: torch.dtype, device: torch.device, budget: int | None, rows: int) -> int:
    """How many rows share one block of logits, from a budget of bytes (never from V / D: that starves the products)."""
    gpu = device.type != "cpu"
    least = 1 if budget else (_GPU_BLOCK_ROWS if gpu else _CPU_BLOCK_ROWS)
    budget = budget or (_GPU_BLOCK_BYTES if gpu else _CPU_BLOCK_BYTES)
    size = max(budget // (classes * work.itemsize), least)
    if rows <= size:
        return max(rows, 1)
    blocks = -(-rows // size)
    return -(-rows // blocks)  # equal blocks rather than a short last one


def logits(hidden: Tensor, matrix: Tensor, *, out: Tensor) -> Tensor:
    """``hidden @ matrix.T`` in the dtype of `out`, written to `out`."""
    if hidden.dtype == out.dtype:
        return torch.mm(hidden, matrix.t(), out=out)
    if hidden.is_cuda:
        return torch.mm(hidden, matrix.t(), out_dtype=out.dtype, out=out)
    if hidden.dtype == torch.bfloat16:
        return out.copy_(torch.mm(hidden, matrix.t()))
    return torch.mm(hidden.to(out.dtype), matrix.to(out.dtype).t(), out=out)


def softmax_(z: Tensor, z_max: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax in place and the log-sum-exp of each row; `z_max` is the row's maximum and `best` its place."""
    if z.device.type == "cpu":
        probability = torch.softmax(z, 1, out=z)
        return probability, z_max - probability.gather(1, best.unsqueeze(1)).squeeze(1).log()
    probability = z.sub_(z_max.unsqueeze(1)).exp_()
    total = probability.sum(1)
    return probability.div_(total.unsqueeze(1)), z_max + total.log()


def scatter_add_(block: Tensor, column: Tensor, value: Tensor) -> None:
    """``block[r, column[r, i]] += value[r, i]``, in an order that does not change from run to run."""
    if block.is_cuda:
        row = torch.arange(len(block), device=block.device).unsqueeze(1).expand_as(column)
        block.index_put_((row, column), value, accumulate=True)  # sorts; scatter_add_ would use atomics
    else:
        block.scatter_add_(1, column, value)


def gradients(
    block: Tensor,
    unit: Tensor,
    hidden: Tensor,
    matrix: Tensor,
    d_hidden: Tensor | None,
    d_matrix: Tensor | None,
    *,
    threshold: float = 0.0,
) -> None:
    """``d_hidden = diag(unit) block @ matrix`` and ``d_matrix += block.T @ diag(unit) hidden``.

    Args:
        block: ``[C, V]`` work dtype, logit gradients in units of `unit`.
        unit: ``[C]``.
        hidden, matrix: ``[C, D]`` and ``[V, D]``, the operands.
        d_hidden: ``[C, D]``, overwritten; None when not wanted.
        d_matrix: ``[V, D]`` work dtype, added to; None when not wanted.
        threshold: leave out every class whose entries are below this in all rows of the block.
    """
    kept = None
    if threshold > 0:
        kept = (block.abs().amax(0) >= threshold).nonzero().squeeze(1)
        block, matrix = block.index_select(1, kept), matrix.index_select(0, kept)
    operand = block.to(hidden.dtype)
    if d_hidden is not None:
        d_hidden.copy_(_product(operand, matrix, block.dtype).mul_(unit.unsqueeze(1)))
    if d_matrix is None:
        return
    # float16 would flush unit * hidden; its largest entry goes to the result instead
    largest = unit.abs().max() if hidden.dtype == torch.float16 else None
    factor = unit if largest is None else unit / largest
    scaled = (hidden * factor.unsqueeze(1).to(block.dtype)).to(hidden.dtype)
    if kept is None and operand.dtype == d_matrix.dtype:
        d_matrix.addmm_(operand.t(), scaled)
        return
    step = max(_SLICE_BYTES // (4 * hidden.shape[1]), 1)
    for low in range(0, operand.shape[1], step):
        product = _product(operand[:, low : low + step].t(), scaled, d_matrix.dtype)
        if largest is not None:
            product.mul_(largest)
        if kept is None:
            d_matrix[low : low + step].add_(product)
        else:
            d_matrix.index_add_(0, kept[low : low + step], product)


def _product(left: Tensor, right: Tensor, work: torch.dtype) -> Tensor:
    """``left @ right`` in `work`."""
    if left.dtype == work:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=work)
    if left.dtype == torch.bfloat16:
        return (left @ right).to(work)
    return left.to(work) @ right.to(work)
