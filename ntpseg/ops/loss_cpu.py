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


def serves_blocks(hidden: Tensor, matrix: Tensor) -> bool:
    """Whether `block_exponentials`, `hidden_gradient` and `weight_gradient_` can be used."""
    return (
        hidden.device.type == "cpu"
        and hidden.dtype == torch.bfloat16
        and hidden.shape[1] % 32 == 0
        and matrix.stride(1) == 1
        and level() >= 2
    )


def exponentials_(tile: Tensor, anchor: Tensor, top: Tensor, best: Tensor, total: Tensor, first: int) -> None:
    """Turns logits into ``exp(z - anchor)`` in place and brings the rows' reductions up to date.

    Args:
        tile: ``[C, T]`` float32, rows contiguous.
        anchor: ``[C]`` float32.
        top, best, total: ``[C]`` float32, int64, float32: running maximum of ``z - anchor``, its class, the sum.
        first: class of the tile's first column.
    """
    torch.ops.ntpseg.loss_exponentials(tile, anchor, top, best, total, first)


def block_exponentials(
    hidden: Tensor, matrix: Tensor, anchor: Tensor, column: Tensor, exact: Tensor, block: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``exp(hidden @ matrix.T - anchor)`` into `block`, with the rows' maximum (less anchor), its class and the sum.

    Args:
        hidden, matrix: ``[C, D]`` and ``[V, D]`` bfloat16, D a multiple of 32.
        anchor, exact: ``[C]`` float32; `exact` is taken for the logit of `column`.
        column: ``[C]`` int64, a class, or -1 for none.
        block: ``[C, V]`` bfloat16, or None where only the reductions are wanted.
    """
    room = hidden.new_empty(0, 0) if block is None else block
    return torch.ops.ntpseg.loss_block(hidden, matrix, anchor, column, exact, room)


def hidden_gradient(block: Tensor, matrix: Tensor, hidden: Tensor, work: torch.dtype) -> Tensor:
    """``block @ matrix``, ``[C, D]`` float32."""
    return torch.ops.ntpseg.loss_hidden_gradient(block, matrix, hidden, hidden.new_empty(0, dtype=work))


def weight_gradient_(d_matrix: Tensor, block: Tensor, scaled: Tensor, matrix: Tensor, add: bool) -> None:
    """``d_matrix (+)= block.T @ scaled``; `d_matrix` is ``[V, D]`` float32."""
    torch.ops.ntpseg.loss_weight_gradient(block, scaled, matrix, d_matrix, add)
