"""Bytes of weights, gradients and optimizer on one rank, for every way in which ranks share them.

Weights, gradients and Adam's two moments take 16 bytes a parameter, divided by the ranks as far as a stage divides them
(Rajbhandari et al., ZeRO, arXiv 1910.02054, section 3 and 5; Zhao et al., PyTorch FSDP, arXiv 2304.11277). What the
engines add to that is of DeepSpeed 0.19 (``runtime/zero/stage_1_and_2.py``, ``stage3.py``) with the ready
configurations ``ntpseg/configs/zero*.json``, and of FSDP2 with the units of `ntpseg.training.sharded_weights`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ntpseg.cluster.planning.numerics import Numerics
from ntpseg.cluster.workload import Workload

# Defaults of DeepSpeed, in parameters: gathered ones that ZeRO-3 keeps for their next use, and a group of its step.
_MAX_LIVE = 10**9
_SUB_GROUP = 10**9
# Master, and Adam's two moments, in float32.
_MASTER, _MOMENTS = 4, 8


@dataclass(frozen=True)
class Moment:
    """What one moment of a step has beyond what all have.

    Attributes:
        gradients: bytes of them, and of their copies.
        gathered: bytes of weights that ranks gathered or cast, and of what is communicated.
    """

    gradients: int = 0
    gathered: int = 0


@dataclass(frozen=True)
class States:
    """Bytes on one rank that do not depend on the batch.

    Attributes:
        weights: in the dtype of the model, and averages of them.
        gradients: that stay from one step to the next.
        optimizer: master copies and moments.
        buffers: of communication, that stay.
        forward: at the end of the forward pass, within the loss.
        backward_start: within the last layer's backward.
        backward_end: within the first layer's.
        step: in the optimizer's step.
        host: bytes of host memory for a rank.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    forward: Moment
    backward_start: Moment
    backward_end: Moment
    step: Moment
    host: int = 0

    @property
    def persistent(self) -> int:
        """What every moment has."""
        return self.weights + self.gradients + self.optimizer + self.buffers


def states(work: Workload, numerics: Numerics, ranks: int, *, accumulation: int = 1) -> States:
    """The states of one rank.

    Args:
        work: the model.
        numerics: sharding and precision.
        ranks: N.
        accumulation: micro-batches of a step: with more than one, gradients are there in the forward pass as well.
    """
    make = {"zero1": _zero_1, "zero2": _zero_2, "zero3": _zero_3, "fsdp2": _fsdp}.get(numerics.sharding, _replicated)
    return make(work, numerics, ranks, accumulation > 1)


def _replicated(work: Workload, numerics: Numerics, ranks: int, accumulated: bool) -> States:
    """One process, and data parallelism: everything on every rank, with DDP's buckets as large as the gradients.

    Autocast keeps what it casts until backward.
    """
    parameters = work.parameters
    total, cast = parameters.total, 2 * (parameters.total - parameters.embedding) if numerics.autocast else 0
    first = 4 * ((parameters.head or parameters.embedding) + parameters.other)
    return States(
        weights=4 * total * (1 + work.ema),
        gradients=0,
        optimizer=_MOMENTS * total,
        buffers=4 * total if numerics.sharding == "ddp" else 0,
        forward=Moment(4 * total * accumulated, cast),
        backward_start=Moment(4 * total if accumulated else first, cast),
        backward_end=Moment(4 * total, cast),
        step=Moment(4 * total),
    )


def _bucket(work: Workload, numerics: Numerics) -> int:
    """DeepSpeed's reduce bucket, ``auto`` in our files: D^2 numbers, which transformers fills in."""
    return work.sizes.hidden**2 * numerics.weight_bytes


def _zero_1(work: Workload, numerics: Numerics, ranks: int, accumulated: bool) -> States:
    """Masters and moments divided; a whole gradient until it is reduced, then this rank's part and a flat copy."""
    size, parameters = numerics.weight_bytes, work.parameters
    total, part = parameters.total, -(-parameters.total // ranks)
    first = size * ((parameters.head or parameters.embedding) + parameters.other)
    return States(
        weights=size * total + 4 * total * work.ema,
        gradients=0,
        optimizer=(_MASTER + _MOMENTS) * part,
        buffers=_bucket(work, numerics),
        forward=Moment(size * total * accumulated),
        backward_start=Moment(size * total if accumulated else first),
        backward_end=Moment(size * total),
        step=Moment(max(size * (total + part), _flat_copies(size, part))),
    )


def _zero_2(work: Workload, numerics: Numerics, ranks: int, accumulated: bool) -> States:
    """ZeRO-1 with gradients divided as they are made; two buckets, since reduction overlaps with backward.

    A weight above the bucket's size is reduced by itself: its gradient and the reduced copy lie side by side.
    """
    size, parameters = numerics.weight_bytes, work.parameters
    total, part = parameters.total, -(-parameters.total // ranks)
    offloaded = numerics.offload != "none"
    kept = 0 if offloaded else size * part
    first = size * (parameters.head or parameters.embedding)
    return States(
        weights=size * total + 4 * total * work.ema,
        gradients=0,
        optimizer=0 if offloaded else (_MASTER + _MOMENTS) * part,
        buffers=2 * _bucket(work, numerics) + (size * parameters.largest if offloaded else 0),
        forward=Moment(kept * accumulated),
        backward_start=Moment(kept * (1 + accumulated) + first),
        backward_end=Moment(kept * (1 + accumulated), 2 * size * parameters.largest_of_layer),
        step=Moment(0 if offloaded else _flat_copies(size, part)),
        host=_host(size, part) if offloaded else 0,
    )


def _flat_copies(size: int, part: int) -> int:
    """A rank's gradients, their flat copy, and that in float32."""
    return part * (2 * size if size == 4 else 2 * size + 4)


def _host(size: int, part: int) -> int:
    """Master, moments and float32 gradients of a rank in host memory, and its weights on their way back."""
    return (_MASTER + _MOMENTS + 4 + size) * part


def _zero_3(work: Workload, numerics: Numerics, ranks: int, accumulated: bool) -> States:
    """Weights divided as well; what was gathered stays as long as DeepSpeed sees its next use within 10^9 parameters.

    A gathered weight's gradient is whole until it is reduced, from a flat copy of its size.
    """
    size, parameters = numerics.weight_bytes, work.parameters
    part = -(-parameters.total // ranks)
    offloaded = numerics.offload != "none"
    gathered = size * min(parameters.total, _MAX_LIVE + parameters.layer)
    last = min(gathered, size * (2 * parameters.layer + parameters.embedding))
    first = 2 * size * (parameters.head or parameters.embedding)
    return States(
        weights=size * part + 4 * part * work.ema,
        gradients=0 if offloaded else size * part,
        optimizer=0 if offloaded else (_MASTER + _MOMENTS) * part,
        buffers=_bucket(work, numerics),
        forward=Moment(0, gathered),
        backward_start=Moment(first, gathered),
        backward_end=Moment(2 * size * parameters.largest_of_layer, last),
        step=Moment(0 if offloaded else 4 * min(part, _SUB_GROUP)),
        host=_host(size, part) if offloaded else 0,
    )


def _fsdp(work: Workload, numerics: Numerics, ranks: int, accumulated: bool) -> States:
    """Float32 shards of rows, of the transforms ``[k - 1, D, D]`` whole ones; units gathered one after the other.

    Heads and root stay gathered into backward. In the forward pass the buffer of the last all-gather, that of the
    heads, lives until its end; in the heads' backward their gradient and the reduce-scatter's copy of it lie beside the
    last layer, gathered ahead; in the first layer's two layers and two copies of gradients beside the embedding.
    """
    size, parameters = numerics.product_bytes, work.parameters
    rows = max(work.heads - 1, 1)
    own = parameters.transforms // rows * -(-rows // ranks)
    part = -(-(parameters.total - parameters.transforms) // ranks) + own
    # A tied embedding is of the heads' unit; dimensions that the ranks do not divide are padded.
    heads = size * ((parameters.head or parameters.embedding) + own * ranks)
    kept, layer = heads + size * (parameters.other - parameters.transforms), size * parameters.layer
    embedding = size * parameters.embedding if parameters.head else 0
    of_layers = 4 * -(-parameters.layer * parameters.layers // ranks)
    return States(
        weights=4 * part * (1 + work.ema),
        gradients=0,
        optimizer=_MOMENTS * part,
        buffers=0,
        forward=Moment(4 * part * accumulated, kept + heads),
        backward_start=Moment(4 * part * accumulated + 2 * heads, kept + layer),
        backward_end=Moment(4 * part if accumulated else of_layers, embedding + 4 * layer),
        step=Moment(4 * part),
    )
