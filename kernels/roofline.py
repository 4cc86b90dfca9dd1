"""What each configuration computes and moves, against the least that the algorithm needs: 6RVD FLOPs and 6RV bytes.

``python -m ntpseg.kernels.roofline`` prints the table of docs/kernels.md. Counted from the launch parameters, not
measured: operand tiles that a product reads again from L2 are left out, as they are for any library product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ntpseg.kernels.chunks import accumulator_bytes, bytes_per_row, plan_chunks
from ntpseg.kernels.gemm_configs import GEMM_CONFIGS

SHAPES = tuple(
    (rows, classes, width) for classes in (32768, 184622) for width in (1024, 2048, 4096) for rows in (6272, 32768)
)
NUM_SMS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}  # A100, H100 SXM, B200
_NEGATIVES = 5


@dataclass(frozen=True)
class Cost:
    """One shape on one architecture, bf16, both gradients.

    Attributes:
        chunk_rows, chunks: the plan.
        flops: of the three products with tiles padded to their full size, over 6RVD.
        bytes: of device memory moved for E and everything that the loss adds to the three products, over 6RV.
        accumulator_traffic: the part of `bytes` (same unit) that is the sum of the weight's gradient over the chunks.
        waves: fill of the persistent grid in the forward product: tiles over tiles of whole waves.
        workspace: bytes beyond the gradients, that sum included.
    """

    chunk_rows: int
    chunks: int
    flops: float
    bytes: float
    accumulator_traffic: float
    waves: float
    workspace: int


def cost(architecture: str, rows: int, classes: int, width: int) -> Cost:
    """Counts for R = `rows`, V = `classes`, D = `width`."""
    config = GEMM_CONFIGS[architecture].forward
    plan = plan_chunks(rows, classes, width, torch.bfloat16, fused=True, BLOCK_N=config.BLOCK_N, needs_accumulator=True)
    blocks = -(-classes // config.BLOCK_N)
    resident_ctas = NUM_SMS[architecture] * config.ctas_per_sm
    tiles = waves = 0
    for low in range(0, rows, plan.rows):
        num_tiles = -(-min(plan.rows, rows - low) // config.BLOCK_M) * blocks
        tiles += num_tiles
        waves += -(-num_tiles // resident_ctas) * resident_ctas
    padded = tiles * config.BLOCK_M * config.BLOCK_N / (rows * classes)

    e = 6 * rows * classes
    statistics = (12 + 16) * rows * blocks  # written once; maxima read twice, sums and ids once
    d_hidden = (4 + 4 + 2) * rows * width  # fp32 product, read to be scaled, written
    scaled = (2 + 2) * rows * width
    gathered = (2 + 2) * rows * width  # rows gathered from the batch; their gradient is written in its place
    # the weight's rows of targets and negatives, none dropped; hidden once more, for the negatives
    token_logits = 2 * rows * (1 + _NEGATIVES + 1) * width
    accumulator = 0
    if plan.count > 1:  # the gradient's own write is in any product
        passes = 6 * (plan.count - 1) if plan.split_accumulator else 4 * (2 * plan.count - 1) + 4
        accumulator = passes * classes * width
    row_bytes = bytes_per_row(classes, width, torch.bfloat16, fused=True, BLOCK_N=config.BLOCK_N)
    return Cost(
        chunk_rows=plan.rows,
        chunks=plan.count,
        flops=(padded + 2) / 3,
        bytes=(e + statistics + d_hidden + scaled + gathered + token_logits + accumulator) / e,
        accumulator_traffic=accumulator / e,
        waves=tiles / waves,
        workspace=plan.rows * row_bytes + accumulator_bytes(plan, classes, width),
    )


def markdown_table() -> Iterator[str]:
    """Lines of Markdown."""
    yield "| arch | V | D | R | chunks x rows | FLOPs / 6RVD | bytes / 6RV | of that, dW sum | grid fill | workspace |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for architecture in NUM_SMS:
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
                f"{c.accumulator_traffic:.2f}",
                f"{c.waves:.3f}",
                f"{c.workspace / 2**20:,.0f} MiB",
            )
            yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join(markdown_table()))
