"""What each configuration computes and moves, against the floor of the algorithm: 6RVD FLOPs and 6RV bytes.

``python -m ntpseg.kernels.roofline`` prints the table of docs/kernels.md. Counted from the launch parameters, not
measured: operand tiles that a product reads again from L2 are left out, as they are for any library product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ntpseg.kernels.chunks import bytes_of_sum, bytes_per_row, plan_chunks
from ntpseg.kernels.gemm_configs import TABLE

SHAPES = tuple(
    (rows, classes, width) for classes in (32768, 184622) for width in (1024, 2048, 4096) for rows in (6272, 32768)
)
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}  # A100, H100 SXM, B200
_NEGATIVES = 5


@dataclass(frozen=True)
class Cost:
    """One shape on one architecture, bf16, both gradients.

    Attributes:
        chunk_rows, chunks: the plan.
        flops: of the three products with tiles padded to their full size, over 6RVD.
        bytes: of device memory moved for E and everything that the loss adds to the three products, over 6RV.
        sum_bytes: the share of `bytes` (same unit) that is the sum of the weight's gradient over the chunks, in fp32
            or beside the gradient.
        waves: fill of the persistent grid in the forward product: tiles over tiles of whole waves.
        workspace: bytes beyond the gradients, that sum included.
    """

    chunk_rows: int
    chunks: int
    flops: float
    bytes: float
    sum_bytes: float
    waves: float
    workspace: int


def cost(architecture: str, rows: int, classes: int, width: int) -> Cost:
    """Counts for R = `rows`, V = `classes`, D = `width`."""
    tile = TABLE[architecture].forward
    plan = plan_chunks(rows, classes, width, torch.bfloat16, fused=True, block_classes=tile.classes, weight_sum=True)
    blocks = -(-classes // tile.classes)
    slots = MULTIPROCESSORS[architecture] * tile.residents
    tiles = waves = 0
    for low in range(0, rows, plan.rows):
        here = -(-min(plan.rows, rows - low) // tile.rows) * blocks
        tiles += here
        waves += -(-here // slots) * slots
    padded = tiles * tile.rows * tile.classes / (rows * classes)

    e = 6 * rows * classes
    statistics = (12 + 16) * rows * blocks  # written once; maxima read twice, sums and ids once
    d_hidden = (4 + 4 + 2) * rows * width  # fp32 product, read to be scaled, written
    scaled = (2 + 2) * rows * width
    placed = 2 * (2 + 2) * rows * width  # rows gathered from the batch, their gradient put back
    single = 2 * 2 * rows * (1 + _NEGATIVES) * width  # both operands of every single logit, none dropped
    total = 0
    if plan.count > 1:  # the gradient's own write is in any product
        passes = 6 * (plan.count - 1) if plan.beside else 4 * (2 * plan.count - 1) + 4
        total = passes * classes * width
    each = bytes_per_row(classes, width, torch.bfloat16, fused=True, block_classes=tile.classes)
    return Cost(
        chunk_rows=plan.rows,
        chunks=plan.count,
        flops=(padded + 2) / 3,
        bytes=(e + statistics + d_hidden + scaled + placed + single + total) / e,
        sum_bytes=total / e,
        waves=tiles / waves,
        workspace=plan.rows * each + bytes_of_sum(plan, classes, width),
    )


def table() -> Iterator[str]:
    """Lines of Markdown."""
    yield "| arch | V | D | R | chunks x rows | FLOPs / 6RVD | bytes / 6RV | of that, dW sum | grid fill | workspace |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for architecture in MULTIPROCESSORS:
        for rows, classes, width in SHAPES:
            c = cost(architecture, rows, classes, width)
            cells = (
                architecture,
                f"{classes:,}",
                f"{width:,}",
                f"{rows:,}",
                f"{c.chunks} x {c.chunk_rows:,}",
                f"{c.flops:.3f}",
                f"{c.bytes:.2f}",
                f"{c.sum_bytes:.2f}",
                f"{c.waves:.3f}",
                f"{c.workspace / 2**20:,.0f} MiB",
            )
            yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join(table()))
