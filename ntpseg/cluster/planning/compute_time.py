"""Time of a step's computation on one GPU: products, the loss's sums, the optimizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ntpseg.cluster.machines import Gpu
from ntpseg.cluster.planning.loss_memory import BLOCK_CLASSES
from ntpseg.cluster.planning.memory import Batch
from ntpseg.cluster.planning.numerics import Numerics
from ntpseg.cluster.workload import Workload
from ntpseg.kernels.chunks import plan_chunks, sum_share

# Of the data sheet's rate, what a large product reaches: 750 of 989 TFLOP/s on an H100, as `ntpseg.kernels.chunks` has.
PRODUCT_SHARE = 0.76
# Of that, what a training step reaches (the `mfu` of a run's log); about 40 % of the data sheet's rate, where Llama 3
# reports 38 to 43 % (arXiv 2407.21783, table 4). Predicted; a run of yours replaces it.
PREDICTED_MFU = 0.55
# Read weight or master, gradient and both moments, write all but the gradient; float32.
_OPTIMIZER_BYTES = 28
# Kernels that a layer's forward and backward start, and the host's time to start one: small micro-batches wait for it.
_LAUNCHES, _LAUNCH_SECONDS = 120, 5e-6
# PCIe 4.0 x16 in practice, and a GPU's share of its host's memory bandwidth; predicted.
_PCIE, _HOST_MEMORY = 25e9, 20e9


@dataclass(frozen=True)
class ComputeTime:
    """Seconds of one step on one GPU.

    Attributes:
        model: forward and backward, or the host's time to start their kernels where that is longer.
        recomputation: the second forward pass of activation checkpointing.
        optimizer: the update of this rank's share.
    """

    model: float
    recomputation: float
    optimizer: float

    @property
    def total(self) -> float:
        """All three."""
        return self.model + self.recomputation + self.optimizer


def compute_time(
    work: Workload, numerics: Numerics, gpu: Gpu, ranks: int, batch: Batch, mfu: float = PREDICTED_MFU
) -> ComputeTime:
    """Time by the operations of `ntpseg.models.flops` and the rate of products; of the optimizer by memory bandwidth.

    Args:
        work: model and sequences.
        numerics: precision and sharding.
        gpu: where.
        ranks: processes in all.
        batch: how a step is cut.
        mfu: model FLOPs utilisation as a run's log has it, of the rate of large products.
    """
    peak = gpu.bf16_flops if numerics.precision == "bfloat16" else gpu.fp32_flops
    rate = peak * PRODUCT_SHARE * mfu
    samples = batch.samples * batch.accumulation
    rows = batch.samples * work.heads * work.supervised
    dtype = torch.bfloat16 if numerics.precision == "bfloat16" else torch.float32
    narrow = dtype == torch.bfloat16
    shape = (work.classes, work.sizes.hidden, dtype)
    chunks = plan_chunks(rows, *shape, fused=True, BLOCK_N=BLOCK_CLASSES, needs_accumulator=narrow)
    sums = work.flops.row * samples * work.heads * work.supervised
    sums *= sum_share(chunks, rows, dtype.itemsize, needs_accumulator=narrow)
    recomputed = work.recomputed_flops(samples) / rate if batch.checkpointing else 0.0
    launches = work.sizes.layers * _LAUNCHES * batch.accumulation * (4 / 3 if batch.checkpointing else 1)
    model = max((work.step_flops(samples) + sums) / rate, launches * _LAUNCH_SECONDS - recomputed)
    share = work.parameters.total / (1 if numerics.sharding in ("one", "ddp") else ranks)
    if numerics.offload == "none":
        optimizer = share * _OPTIMIZER_BYTES / gpu.memory_bandwidth
    else:
        optimizer = share * (_OPTIMIZER_BYTES / _HOST_MEMORY + 2 * numerics.weight_bytes / _PCIE)
    return ComputeTime(model, recomputed, optimizer)
