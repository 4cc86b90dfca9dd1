"""The loss's native passes for the CPU (csrc/cpu/loss_*.cpp), and when they can be used.

They serve float32 (one pass over a tile of logits, with AVX2 or AVX-512) and bfloat16 (products on AMX tiles with
float32 accumulators, the pass over the logits as their epilogue). Everything else, every other processor and a package
without its extension run on plain PyTorch.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ntpseg.ops.extension import usable


def level() -> int:
    """0: plain PyTorch; 1: AVX2 with FMA, or AVX-512, serves float32; 2: AMX as well, serves bfloat16."""
    if os.environ.get("NTPSEG_DISABLE_NATIVE") == "1" or not usable("cpu"):
        return 0
    if not hasattr(torch.ops.ntpseg, "loss_cpu_level"):  # an extension of an earlier build
        return 0
    return int(torch.ops.ntpseg.loss_cpu_level(torch.empty(0)))


def serves_tiles(hidden: Tensor) -> bool:
    """Whether `exponentials_` can be used."""
    return hidden.device.type == "cpu" and hidden.dtype == torch.float32 and level() >= 1


def serves_blocks(hidden: Tensor, weight: Tensor) -> bool:
    """Whether `block_exponentials`, `hidden_gradient` and `weight_gradient_` can be used."""
    return (
        hidden.device.type == "cpu"
        and hidden.dtype == torch.bfloat16
        and hidden.shape[1] % 32 == 0
        and weight.stride(1) == 1
        and level() >= 2
    )


def exponentials_(tile: Tensor, anchor: Tensor, row_max: Tensor, argmax: Tensor, row_sum: Tensor, first: int) -> None:
    """Turns logits into ``exp(z - anchor)`` in place and brings the rows' reductions up to date.

    Args:
        tile: ``[C, T]`` float32, rows contiguous.
        anchor: ``[C]`` float32.
        row_max, argmax, row_sum: ``[C]`` float32, int64, float32: running maximum of ``z - anchor``, its class, sum.
        first: class of the tile's first column.
    """
    torch.ops.ntpseg.loss_exponentials(tile, anchor, row_max, argmax, row_sum, first)


def block_exponentials(
    hidden: Tensor, weight: Tensor, anchor: Tensor, target_column: Tensor, target_logit: Tensor, block: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``exp(hidden @ weight.T - anchor)`` into `block`, with the rows' maximum (less anchor), its class and the sum.

    Args:
        hidden, weight: ``[C, D]`` and ``[V, D]`` bfloat16, D a multiple of 32.
        anchor, target_logit: ``[C]`` float32; `target_logit` is taken for the logit of `target_column`.
        target_column: ``[C]`` int64, a class, or -1 for none.
        block: ``[C, V]`` bfloat16, or None where only the reductions are wanted.
    """
    block = hidden.new_empty(0, 0) if block is None else block
    return torch.ops.ntpseg.loss_block(hidden, weight, anchor, target_column, target_logit, block)


def hidden_gradient(block: Tensor, weight: Tensor, hidden: Tensor, work: torch.dtype) -> Tensor:
    """``block @ weight``, ``[C, D]`` float32."""
    return torch.ops.ntpseg.loss_hidden_gradient(block, weight, hidden, hidden.new_empty(0, dtype=work))


def weight_gradient_(d_weight: Tensor, block: Tensor, scaled: Tensor, weight: Tensor, add: bool) -> None:
    """``d_weight (+)= block.T @ scaled``; `d_weight` is ``[V, D]`` float32."""
    torch.ops.ntpseg.loss_weight_gradient(block, scaled, weight, d_weight, add)
