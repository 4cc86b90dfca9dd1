"""Peak memory of one rank by part: states, activations, loss, hard error tokens, framework."""

from __future__ import annotations

from dataclasses import dataclass

from ntpseg.cluster.planning.activations import layer_activations
from ntpseg.cluster.planning.loss_memory import loss_memory
from ntpseg.cluster.planning.numerics import Numerics
from ntpseg.cluster.planning.states import states
from ntpseg.cluster.workload import Workload

PHASES = ("forward", "backward_start", "backward_end", "step")
# CUDA's context, cuBLAS's workspace, and what NCCL takes for its channels; predicted, not measured here.
_CONTEXT_BYTES = 768 << 20
_NCCL_BYTES = 1 << 30


@dataclass(frozen=True)
class Batch:
    """How a step is cut.

    Attributes:
        samples: sequences of a micro-batch on one rank.
        accumulation: micro-batches of a step.
        checkpointing: only the inputs of layers are kept, each layer is computed again in backward (Chen et al., arXiv
            1604.06174).
    """

    samples: int = 1
    accumulation: int = 1
    checkpointing: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank at the peak of a step.

    Attributes:
        parts: by part, at the peak.
        peaks: of the tensors, by phase (`PHASES`): what ``torch.cuda.max_memory_allocated`` counts.
        framework: context and communication libraries, which no allocator of PyTorch counts.
        host: host memory for this rank.
    """

    parts: dict[str, int]
    peaks: dict[str, int]
    framework: int
    host: int

    @property
    def phase(self) -> str:
        """Where the peak lies."""
        return max(self.peaks, key=lambda name: self.peaks[name])

    @property
    def tensors(self) -> int:
        """Of the tensors, at the peak."""
        return max(self.peaks.values())

    @property
    def total(self) -> int:
        """With the framework."""
        return self.tensors + self.framework


def memory_plan(
    work: Workload, numerics: Numerics, ranks: int, batch: Batch, *, pairs: int | None = None
) -> MemoryPlan:
    """The memory of one rank.

    The peak is the largest of four moments: the loss at the end of the forward pass; backward within the last layer,
    with all activations; backward within the first, with all gradients; the optimizer's step. In between activations go
    at a constant rate and gradients come at one, so that no other moment can be higher.

    Args:
        work: model and sequences; all as long as the longest.
        numerics: sharding, precision, device.
        ranks: processes in all.
        batch: how a step is cut.
        pairs: training pairs, of which the memory of hard error tokens has rows; those of the workload by default.
    """
    kept = states(work, numerics, ranks, accumulation=batch.accumulation)
    layer = layer_activations(work, numerics, batch.samples)
    loss = loss_memory(work, numerics, batch.samples)
    pairs = work.sentences.pairs if pairs is None else pairs
    hard_tokens = hard_token_bytes(pairs or 0, work.hard_tokens)
    # The last norm's input and output, with which the loss begins.
    last = batch.samples * work.longest * work.sizes.hidden * (numerics.residual_bytes + numerics.product_bytes)
    inputs, full = work.sizes.layers * layer.input, layer.kept
    stored = inputs + (0 if batch.checkpointing else work.sizes.layers * full)
    recomputed = full if batch.checkpointing else 0
    moments = {
        "forward": (kept.forward, stored + last, loss.forward),
        "backward_start": (kept.backward_start, stored + max(recomputed + layer.backward, loss.backward), 0),
        "backward_end": (kept.backward_end, layer.input + full + layer.backward, 0),
        "step": (kept.step, 0, 0),
    }
    peaks = {
        name: kept.persistent + hard_tokens + moment.gradients + moment.gathered + activations + of_loss
        for name, (moment, activations, of_loss) in moments.items()
    }
    moment, activations, of_loss = moments[max(peaks, key=lambda name: peaks[name])]
    framework = 0 if numerics.device == "cpu" else _CONTEXT_BYTES + (_NCCL_BYTES if ranks > 1 else 0)
    workspace = min(of_loss, loss.workspace)
    parts = {
        "weights": kept.weights,
        "gradients": kept.gradients + moment.gradients,
        "optimizer": kept.optimizer,
        "gathered weights and buffers": kept.buffers + moment.gathered,
        "activations": activations,
        "heads and loss": of_loss - workspace,
        "loss workspace": workspace,
        "hard error tokens": hard_tokens,
        "framework": framework,
    }
    return MemoryPlan(parts, peaks, framework, kept.host)


def hard_token_bytes(pairs: int, entries: int) -> int:
    """Bytes of `ntpseg.HardTokenMemory`: two epochs of deviation, position, token and stamp (int32 each) and flags."""
    return 2 * pairs * ((3 * entries + 1) * 4 + 1) if entries else 0
