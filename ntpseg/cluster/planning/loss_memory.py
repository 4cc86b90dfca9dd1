"""Bytes of the heads and the loss of one micro-batch (docs/kernels.md has the algorithm)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ntpseg.cluster.planning.numerics import Numerics
from ntpseg.cluster.workload import Workload
from ntpseg.kernels.chunks import plan_chunks, workspace_bytes
from ntpseg.losses.products import Tiling

# Classes of a block of row statistics; their share of the workspace is below 1 % whatever it is.
BLOCK_CLASSES = 128


@dataclass(frozen=True)
class LossMemory:
    """Bytes of the loss for one micro-batch.

    Attributes:
        forward: all that is alive at its peak, with the workspace.
        workspace: of `forward`, what the kernels take beyond operands and gradients.
        backward: what the backward of heads and loss has alive, the head's gradient left out.
    """

    forward: int
    workspace: int
    backward: int


def loss_memory(work: Workload, numerics: Numerics, samples: int) -> LossMemory:
    """Heads, loss and both of its gradients, which are made in the forward pass.

    With n the positions that the heads read, k heads, D features, V' classes and R = k x supervised rows: head states
    ``n (2 k - 1) D`` (the later heads' products before their SiLU, all heads' states) and a copy of the hidden states
    they are made of; rows ``R D`` and their gradient; the weight's gradient ``V' D``; the workspace of the block of
    exponentials. On a GPU that is `ntpseg.kernels.chunks`' own plan; on a CPU `Tiling`'s, with two temporaries of a
    block's rows.
    """
    size, width, heads = numerics.product_bytes, work.sizes.hidden, work.heads
    rows = samples * heads * work.supervised
    read = samples * work.tail * width * size
    copied = read if samples > 1 else 0
    states = (2 * heads - 1) * read if heads > 1 else 0
    if numerics.device == "cuda":
        dtype = torch.bfloat16 if size == 2 else torch.float32
        shape = (work.classes, width, dtype)
        plan = plan_chunks(rows, *shape, fused=True, BLOCK_N=BLOCK_CLASSES, needs_accumulator=size == 2)
        workspace = workspace_bytes(plan, *shape, fused=True, BLOCK_N=BLOCK_CLASSES, needs_accumulator=size == 2)
        gradients = rows * width * size + heads * read + work.classes * width * size
        # Autocast casts the output matrix for the loss.
        gradients += work.vocabulary * width * size if numerics.autocast else 0
    else:
        tiling = Tiling.choose(rows, work.classes, torch.bfloat16 if size == 2 else torch.float32, _CPU, None)
        e_row = work.classes + 64 // tiling.e_dtype.itemsize
        workspace = tiling.block_rows * (e_row * tiling.e_dtype.itemsize + 2 * 4 * width)
        gradients = 2 * rows * width * size + 4 * work.classes * width
    later = heads + 2 * (heads - 1) + 2 if heads > 1 else 2
    return LossMemory(forward=copied + states + gradients + workspace, workspace=workspace, backward=later * read)


_CPU = torch.device("cpu")
