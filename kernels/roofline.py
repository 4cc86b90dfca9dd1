"""What each configuration computes and moves, against the least that the algorithm needs: 6RVD FLOPs and 6RV bytes.

``python -m ntpseg.kernels.roofline`` prints the tables of docs/kernels.md. Counted from the launch parameters, not
measured: operand tiles that a product reads again from L2 are left out, as they are for any library product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ntpseg.kernels.chunks import WORKSPACES, plan_chunks, sum_bytes, sum_share, workspace_bytes
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
        sum_share: time of that sum over the time of the products on an H100, as `ntpseg.kernels.chunks` estimates it.
        workspace: bytes beyond the gradients, that sum included.
    """

    chunk_rows: int
    chunks: int
    flops: float
    bytes: float
    accumulator_traffic: float
    waves: float
    sum_share: float
    workspace: int


def cost(architecture: str, rows: int, classes: int, width: int, workspace: str = "small") -> Cost:
    """Counts for R = `rows`, V = `classes`, D = `width`."""
    config = GEMM_CONFIGS[architecture].forward
    shape = (classes, width, torch.bfloat16)
    how: dict[str, Any] = {"fused": True, "BLOCK_N": config.BLOCK_N, "needs_accumulator": True}
    plan = plan_chunks(rows, *shape, **how, workspace=workspace)
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
    accumulator = sum_bytes(plan, classes, width)
    return Cost(
        chunk_rows=plan.rows,
        chunks=plan.count,
        flops=(padded + 2) / 3,
        bytes=(e + statistics + d_hidden + scaled + gathered + token_logits + accumulator) / e,
        accumulator_traffic=accumulator / e,
        waves=tiles / waves,
        sum_share=sum_share(plan, rows, torch.bfloat16.itemsize),
        workspace=workspace_bytes(plan, *shape, **how),
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


def workspace_table(architecture: str = "sm_90") -> Iterator[str]:
    """Lines of Markdown: what `LossOptions.workspace` changes, a line per shape."""
    yield f"| V | D | R | {' | '.join(f'{name}: chunks x rows | dW sum | workspace' for name in WORKSPACES)} |"
    yield "|---|---|---|" + "---|---|---|" * len(WORKSPACES)
    for rows, classes, width in SHAPES:
        cells = [f"{classes:,}", f"{width:,}", f"{rows:,}"]
        for workspace in WORKSPACES:
            c = cost(architecture, rows, classes, width, workspace)
            cells += [f"{c.chunks} x {c.chunk_rows:,}", f"{c.sum_share:.1%}", f"{c.workspace / 2**20:,.0f} MiB"]
        yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join([*markdown_table(), "", *workspace_table()]))
