"""What a training step sends: calls and bytes of each collective, predicted from a model's parameters.

`step_traffic` counts them for DDP, ZeRO-1, 2 and 3 and FSDP2; `training_collectives`, `het_exchange` and
`vocab_parallel_loss` what this package adds; `trainer_traffic` all of a step. ``python -m benchmarks.communication``
holds them against the profiler.
"""

from ntpseg.cluster.communication.collective import Collective, by_kind, total_bytes, wire_bytes
from ntpseg.cluster.communication.extras import het_exchange, training_collectives, vocab_parallel_loss
from ntpseg.cluster.communication.parameters import ModelShape, Module, Parameter
from ntpseg.cluster.communication.strategies import STRATEGIES, TrafficOptions, step_traffic, trainer_traffic

__all__ = [
    "STRATEGIES",
    "Collective",
    "ModelShape",
    "Module",
    "Parameter",
    "TrafficOptions",
    "by_kind",
    "het_exchange",
    "step_traffic",
    "total_bytes",
    "trainer_traffic",
    "training_collectives",
    "vocab_parallel_loss",
    "wire_bytes",
]
