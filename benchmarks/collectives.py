"""Counts the collectives of a block on gloo by PyTorch's profiler: kind and payload of every call.

The profiler's operators (``c10d::``) say what was called, but not the sizes in lists of tensors; gloo's own events say
sizes and dtypes, but run a reduce-scatter as an all-reduce. Together they are whole. DeepSpeed's own log of
communication does not see PyTorch's calls or ours, so it is not used.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

Calls = Counter[tuple[str, int]]

_ITEM_BYTES = {
    "float": 4,
    "double": 8,
    "c10::BFloat16": 2,
    "c10::Half": 2,
    "long int": 8,
    "long": 8,
    "int": 4,
    "unsigned char": 1,
    "bool": 1,
}
# Operators whose own arguments are tensors: kind, and which argument is the whole and which this rank's part.
_OF_TENSORS = {
    "c10d::_allgather_base_": ("all_gather", 0, 1),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1, 0),
}
# Operators on lists of tensors, and gloo's event of each.
_OF_LISTS = {
    "c10d::allreduce_": ("all_reduce", "gloo:all_reduce"),
    "c10d::allgather_": ("all_gather", "gloo:all_gather"),
    "c10d::broadcast_": ("broadcast", "gloo:broadcast"),
}
_WITHOUT_DATA = ("c10d::barrier", "gloo:barrier")


@contextmanager
def counted() -> Iterator[Calls]:
    """A block whose collectives are counted, ``(kind, payload in bytes): calls``; filled when the block ends.

    Raises:
        ValueError: a collective ran of which the profiler does not tell the size.
    """
    calls: Calls = Counter()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        yield calls
    calls.update(count(profiler.profiler.kineto_results.events(), dist.get_world_size()))


def count(events: Any, ranks: int) -> Calls:
    """The calls among the events of a profile, see `counted`."""
    calls: Calls = Counter()
    own: dict[str, Calls] = {}
    lists: Counter[str] = Counter()
    for event in events:
        name = event.name()
        if name in _WITHOUT_DATA or not name.startswith(("c10d::", "gloo:")):
            continue
        shapes, dtypes = event.shapes(), event.dtypes()
        if name in _OF_TENSORS:
            kind, whole, part = _OF_TENSORS[name]
            calls[kind, _bytes(shapes[whole], dtypes[whole])] += 1
            # What gloo runs for it, which must not be counted once more.
            run, seen = ("all_reduce", whole) if kind == "reduce_scatter" else ("all_gather", part)
            own.setdefault(f"gloo:{run}", Counter())[name, _bytes(shapes[seen], dtypes[seen])] -= 1
        elif name in _OF_LISTS:
            lists[name] += 1
        elif name.startswith("gloo:"):
            own.setdefault(name, Counter())["", _bytes(shapes[0], dtypes[0])] += 1
        else:
            raise ValueError(f"collectives must be of those that are counted here, got {name}")
    for name, (kind, event) in _OF_LISTS.items():
        sizes: Counter[int] = Counter()
        for (_, size), number in own.pop(event, Counter()).items():
            sizes[size] += number
        if sum(sizes.values()) != lists[name] or min(sizes.values(), default=0) < 0:
            raise ValueError(f"{name} must have one event of gloo a call, got {lists[name]} calls and {sizes}")
        for size, number in sizes.items():
            if number:
                calls[kind, size * (ranks if kind == "all_gather" else 1)] += number
    if own:
        raise ValueError(f"gloo's events must belong to collectives that are counted here, got {sorted(own)}")
    return calls


def _bytes(shape: list[int], dtype: str) -> int:
    if dtype not in _ITEM_BYTES:
        raise ValueError(f"dtype of a collective must be one of {', '.join(_ITEM_BYTES)}, got {dtype!r}")
    return math.prod(shape) * _ITEM_BYTES[dtype]
