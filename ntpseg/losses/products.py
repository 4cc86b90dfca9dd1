"""The matrix products over a block of rows, tile sizes, and what each device and dtype does best for them."""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ntpseg.ops import loss_cpu

_CPU_BLOCK_BYTES, _CPU_BLOCK_ROWS = 100 << 20, 64
_GPU_BLOCK_BYTES, _GPU_BLOCK_ROWS = 1 << 30, 2048  # fewer rows starve the products
_CPU_TILE_BYTES, _GPU_TILE_BYTES = 5 << 19, 256 << 20  # on a CPU: a core's second-level cache
_WIDENED_BYTES = 4 << 20  # of the part of a weight that a CPU holds in a wider dtype at a time
_WIDENED_BLOCK_BYTES = 80 << 20  # room for that part, and for what is kept in the operands' dtype besides
_TILE_STEP = 256
_PAIRS = 4 << 20  # entries of a table of pairs of columns
_CACHE_LINE = 64


@functools.cache
def has_bfloat16_units() -> bool:
    """Whether this processor multiplies bfloat16; without, PyTorch does it one number at a time."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        # not oneDNN's answer, which says yes to any AVX-512 and then converts to float32 inside the product
        return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a PyTorch without oneDNN
        return False


def product_dtype(operand: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which operands are multiplied: their own, or float32 where that is faster by far."""
    narrow = operand == torch.float16 or (operand == torch.bfloat16 and not has_bfloat16_units())
    return torch.float32 if narrow and device.type == "cpu" else operand


@dataclass(frozen=True)
class Tiling:
    """How the rows and classes of one call are cut up.

    Attributes:
        block_rows: rows of a block.
        tile_classes: classes of a tile of it.
        product_dtype: of the hidden states of a block.
        e_dtype: of a block's exponentials.
        device: of everything.
    """

    block_rows: int
    tile_classes: int
    product_dtype: torch.dtype
    e_dtype: torch.dtype
    device: torch.device

    @staticmethod
    def choose(rows: int, classes: int, operand: torch.dtype, device: torch.device, budget: int | None) -> Tiling:
        """From a budget of bytes for a block, never from V / D: that starves the products where V is large."""
        gpu = device.type != "cpu"
        product = product_dtype(operand, device)
        # exp(z - z[y]) leaves the range of float16
        e_dtype = torch.float32 if product == torch.float16 else product
        min_rows = 1 if budget else (_GPU_BLOCK_ROWS if gpu else _CPU_BLOCK_ROWS)
        usual = _WIDENED_BLOCK_BYTES if product != operand else _CPU_BLOCK_BYTES
        budget = budget or (_GPU_BLOCK_BYTES if gpu else usual)
        size = max(budget // (max(classes, 1) * e_dtype.itemsize), min_rows)
        size = -(-rows // -(-rows // size)) if rows else 1  # equal blocks rather than a short last one
        tile = (_GPU_TILE_BYTES if gpu else _CPU_TILE_BYTES) // (4 * size) // _TILE_STEP * _TILE_STEP
        return Tiling(size, max(tile, _TILE_STEP), product, e_dtype, device)

    def allocate(self, classes: int) -> Tensor:
        """Room for the exponentials of one block, ``[block_rows, classes]``."""
        # rows a power of two apart would all fall into the same few sets of a cache
        padded = classes + _CACHE_LINE // self.e_dtype.itemsize
        e = torch.empty(self.block_rows, padded, dtype=self.e_dtype, device=self.device)
        e[:, classes:] = 0  # oneDNN multiplies what follows an odd row by zero, and not-a-number survives that
        return e[:, :classes]


def logits(hidden: Tensor, weight: Tensor, *, out: Tensor) -> Tensor:
    """``hidden @ weight.T`` written to `out`, accumulated in its dtype; `hidden` is in `Tiling.product_dtype`.

    PyTorch has no CPU product of bfloat16 into float32: there the result is rounded to bfloat16 on the way.
    """
    if hidden.dtype == out.dtype == weight.dtype:
        return torch.mm(hidden, weight.t(), out=out)
    if hidden.dtype == out.dtype:
        for part, wide in _widened(weight, out.dtype):
            torch.mm(hidden, wide.t(), out=out[:, part])
        return out
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    return out.copy_(torch.mm(hidden, weight.t()))


def indexed_dot(hidden: Tensor, weight: Tensor, token: Tensor, work: torch.dtype) -> Tensor:
    """``[C, q]``: the logits of `token` ``[C, q]``, products and sums in `work`."""
    wide = hidden.to(work)
    dots = torch.empty(token.shape, dtype=work, device=hidden.device)
    for column in range(token.shape[1]):
        dots[:, column] = (wide * weight.index_select(0, token[:, column])).sum(1)
    return dots


def scatter_add_(e: Tensor, column: Tensor, value: Tensor) -> None:
    """``e[r, column[r, i]] += value[r, i]``, the same from run to run: repeated columns are summed beforehand."""
    row = torch.arange(len(e), device=e.device).unsqueeze(1).expand_as(column)
    total = e[row, column].to(value.dtype)
    # the table of equal columns has their square of entries a row
    step = max(_PAIRS // max(column.shape[1] ** 2, 1), 1)
    for rows, columns, values in zip(total.split(step), column.split(step), value.split(step)):
        same = (columns.unsqueeze(2) == columns.unsqueeze(1)).to(value.dtype)
        rows += torch.einsum("rij,rj->ri", same, values)
    e[row, column] = total.to(e.dtype)


def classes_above(e: Tensor, row_sum: Tensor, threshold: float, tiling: Tiling) -> Tensor:
    """``[n]`` int64: the classes whose entry, in units of probability, reaches `threshold` in some row."""
    scale = (1 / row_sum).unsqueeze(1)
    column_max = [(part.abs() * scale).amax(0) for part in e.split(tiling.tile_classes, 1)]
    return (torch.cat(column_max) >= threshold).nonzero().squeeze(1)


def hidden_gradient(
    e: Tensor, hidden: Tensor, weight: Tensor, row_scale: Tensor, out: Tensor, classes: Tensor | None
) -> None:
    """``out = diag(row_scale) e @ weight``, over `classes` only unless that is None."""
    if classes is not None:
        e, weight = e.index_select(1, classes), weight.index_select(0, classes)
    if not e.shape[1]:  # a rank without classes, or a filter that keeps none
        out.zero_()
        return
    if loss_cpu.serves_blocks(hidden, weight):
        product = loss_cpu.hidden_gradient(e, weight, hidden, row_scale.dtype)
    elif _mixed(e, row_scale.dtype) and e.dtype == weight.dtype:
        product = torch.mm(e, weight, out_dtype=row_scale.dtype)
    elif e.dtype == weight.dtype:
        product = e @ weight
    else:
        product = e.new_zeros(len(e), weight.shape[1])
        for part, wide in _widened(weight, e.dtype):
            product.addmm_(e[:, part], wide)
    out.copy_(product * row_scale.unsqueeze(1))


def weight_gradient(
    e: Tensor,
    hidden: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    out: Tensor,
    classes: Tensor | None,
    tiling: Tiling,
    *,
    add: bool,
) -> None:
    """``out (+)= e.T @ diag(row_scale) hidden``, in the work dtype; over `classes` only unless that is None."""
    scaled = (hidden * row_scale.unsqueeze(1)).to(e.dtype)
    if classes is not None:
        e = e.index_select(1, classes)
    elif e.dtype == out.dtype:
        torch.addmm(out, e.t(), scaled, beta=float(add), out=out)
        return
    elif loss_cpu.serves_blocks(scaled, weight):
        loss_cpu.weight_gradient_(out, e, scaled, weight, add)
        return
    elif not add:
        out.zero_()
    turned = scaled.t().contiguous()
    for low in range(0, e.shape[1], tiling.tile_classes):
        part = e[:, low : low + tiling.tile_classes]
        if _mixed(part, out.dtype):
            product = torch.mm(part.t(), scaled, out_dtype=out.dtype)
        elif part.dtype == torch.bfloat16:
            # oneDNN is more than twice as fast with the small operand transposed than with E
            product = (turned @ part).t().contiguous()
        else:
            product = part.t() @ scaled
        if classes is None:
            out[low : low + tiling.tile_classes].add_(product)
        else:
            out.index_add_(0, classes[low : low + tiling.tile_classes], product.to(out.dtype))


def _widened(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """`weight` in another dtype, some rows at a time on a CPU: all of it would not fit beside a block."""
    step = max(len(weight), 1)
    if weight.device.type == "cpu":
        step = max(_WIDENED_BYTES // (weight.shape[1] * dtype.itemsize) // _TILE_STEP * _TILE_STEP, _TILE_STEP)
    for low in range(0, len(weight), step):
        part = slice(low, min(low + step, len(weight)))
        yield part, weight[part].to(dtype)


def _mixed(operand: Tensor, work: torch.dtype) -> bool:
    """Whether the device multiplies `operand` into `work` directly."""
    return operand.is_cuda and operand.dtype != work
