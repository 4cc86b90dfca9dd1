"""DeepSpeed's ZeRO-3: its coordinator of gathers played through, by ``partitioned_param_coordinator.py`` of 0.19.8.

A weight is gathered when its module runs or by prefetching, and released after it unless it is used again within
``stage3_max_reuse_distance`` elements (1e9 by default). So a model below that size is gathered once in a micro-batch,
and a larger one nearly twice, the layers around the turn from forward to backward being kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from ntpseg.cluster.communication.collective import Collective, Phase, grouped
from ntpseg.cluster.communication.parameters import ModelShape, Module, Parameter

# ``sub_group_size``: elements of a rank's part.
_SUB_GROUP = 1_000_000_000


@dataclass(frozen=True)
class Buckets:
    """Elements: ``reduce_bucket_size`` and the ``stage3_*`` of the same names."""

    reduce: int
    prefetch: int
    persistence: int
    max_live: int
    max_reuse: int


def zero3(
    shape: ModelShape, ranks: int, accumulation: int, element_bytes: int, buckets: Buckets, *, checkpointing: bool
) -> list[Collective]:
    """Weights gathered as modules run, gradients reduce-scattered in buckets, small weights gathered after the step.

    Every parameter is padded to a multiple of the ranks. Those of at most `Buckets.persistence` elements stay gathered.

    Args:
        shape: the model's parameters.
        ranks: n.
        accumulation: micro-batches of a step.
        element_bytes: of weights and gradients.
        buckets: sizes.
        checkpointing: layers run forward again in backward.
    """

    def payload(parameters: Iterable[Parameter]) -> int:
        return sum(-(-p.numel // ranks) * ranks for p in parameters) * element_bytes

    gathers: dict[Phase, list[int]] = {"forward": [], "backward": []}
    for phase, parameters in _gathers(shape, buckets, checkpointing):
        gathers[phase].append(payload(parameters))
    persistent = [payload([p]) for p in shape.parameters if p.numel <= buckets.persistence]
    calls = {"times": accumulation, "micro_steps": accumulation}
    reduced = [payload(run) for run in _reduce_buckets(shape.gradient_order, buckets.reduce)]
    return [
        *grouped("all_gather", gathers["forward"], "forward", "weights for forward", **calls),
        *grouped("all_gather", gathers["backward"], "backward", "weights for backward", **calls),
        *grouped("reduce_scatter", reduced, "backward", "gradients", **calls),
        Collective("all_reduce", 8, _sub_groups(shape, ranks), "step", "norm of the gradient, by group"),
        *grouped("all_gather", persistent, "step", "updated weights that stay gathered"),
    ]


@dataclass(frozen=True)
class _Run:
    """A module's forward or backward, at whose beginning its weights are gathered.

    Attributes:
        phase: of the micro-batch.
        module: whose weights.
        ends: they may be released after it.
    """

    phase: Phase
    module: Module
    ends: bool = True


def _trace(modules: tuple[Module, ...], checkpointing: bool) -> list[_Run]:
    """Modules as DeepSpeed's hooks see a micro-batch run them, those without weights too: it prefetches at each.

    A module's backward begins before that of what is inside it. Of a checkpointed layer the hooks of the last module,
    and of those around it, come first; then all inside runs forward again and stops within the last module, when all
    that backward needs is there (``torch.utils.checkpoint.set_checkpoint_early_stop``); the last is over after that.
    """
    trace = [_Run("forward", module) for module in modules]
    trace += [_Run("backward", module) for module in modules if not module.name]
    differentiated = [module for module in modules if module.name not in ("", "backbone.rotary_emb")]
    for layer, run in groupby(_backward(differentiated), key=lambda module: module.layer):
        backward = list(run)
        if not checkpointing or layer is None:
            trace += [_Run("backward", module) for module in backward]
            continue
        inside = [module for module in modules if module.layer == layer]
        chain = [module for module in inside if f"{inside[-1].name}.".startswith(f"{module.name}.")]
        trace += [_Run("backward", module, ends=False) for module in chain]
        trace += [_Run("backward", module) for module in inside if module is not chain[0] or module is chain[-1]]
        trace += [_Run("backward", module) for module in backward if module not in chain]
    return trace


def _backward(modules: list[Module]) -> list[Module]:
    """The reverse order, but each before what is inside it."""
    blocks: list[list[Module]] = []
    start = 0
    while start < len(modules):
        stop = start + 1
        while stop < len(modules) and modules[stop].name.startswith(f"{modules[start].name}."):
            stop += 1
        blocks.append([modules[start], *_backward(modules[start + 1 : stop])])
        start = stop
    return [module for block in reversed(blocks) for module in block]


def _sub_groups(shape: ModelShape, ranks: int) -> int:
    """Into which the optimizer's groups are cut."""
    count = 0
    for group in shape.optimizer_groups:
        filled = 0
        for index, parameter in enumerate(group):
            filled += -(-parameter.numel // ranks)
            if filled >= _SUB_GROUP or index == len(group) - 1:
                count, filled = count + 1, 0
    return count


@lru_cache(maxsize=16)  # curves ask for many numbers of ranks, which change nothing here
def _gathers(shape: ModelShape, buckets: Buckets, checkpointing: bool) -> list[tuple[Phase, list[Parameter]]]:
    """Every gather of a micro-batch: when, and what."""
    trace = _trace(shape.modules, checkpointing)
    queue = deque((p, step) for step, run in enumerate(trace) for p in run.module.parameters)
    available = {p for p in shape.parameters if p.numel <= buckets.persistence}
    persistent = frozenset(available)
    fetched_for = dict.fromkeys(shape.parameters, -1)
    live = 0
    gathers: list[tuple[Phase, list[Parameter]]] = []

    def gather(phase: Phase, parameters: list[Parameter]) -> int:
        available.update(parameters)
        gathers.append((phase, parameters))
        return sum(p.numel for p in parameters)

    for step, run in enumerate(trace):
        own = list(dict.fromkeys(run.module.parameters))
        missing = [p for p in own if p not in available]
        if missing:
            live += gather(run.phase, missing)
        for _ in [p for p in own if fetched_for[p] < step]:
            parameter, used = queue.popleft()
            fetched_for[parameter] = used
        limit, chosen, size = min(buckets.max_live - live, buckets.prefetch), [], 0
        while queue and size < limit:
            parameter, used = queue.popleft()
            fetched_for[parameter] = max(fetched_for[parameter], used)
            if parameter not in available and parameter not in chosen:
                chosen.append(parameter)
                size += parameter.numel
        if chosen:
            live += gather(run.phase, chosen)
        if not run.ends:
            continue
        for parameter in set(own) - persistent - _kept(trace[step + 1 :], set(own), buckets.max_reuse):
            # A later use that prefetching has passed already would never be gathered again.
            if fetched_for[parameter] <= step + 1:
                available.discard(parameter)
                live -= parameter.numel
    return gathers


def _kept(coming: list[_Run], own: set[Parameter], reach: int) -> set[Parameter]:
    """Those of `own` that are used again before `reach` elements of other modules have been."""
    kept: set[Parameter] = set()
    passed = 0
    for run in coming:
        if passed >= reach or kept == own:
            break
        kept.update(own.intersection(run.module.parameters))
        passed += sum(p.numel for p in run.module.parameters)
    return kept


def _reduce_buckets(order: Iterable[Parameter], bucket: int) -> list[list[Parameter]]:
    """Parameters whose gradients are reduce-scattered together."""
    runs: list[list[Parameter]] = []
    filled = 0
    for parameter in order:
        if not runs or filled + parameter.numel > bucket:
            runs.append([])
            filled = 0
        runs[-1].append(parameter)
        filled += parameter.numel
    return runs
