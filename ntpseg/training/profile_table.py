"""From the events of `torch.profiler` to the time of each part of a training step, forward and backward.

Time that an event spends outside of its children goes to the innermost range around it (`ntpseg.utils.ranges`). A
backward function goes to the part of the operator that made it: both carry one sequence number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ntpseg.utils.ranges import PREFIX

# In the order of a step; a part that never ran has no row.
PARTS = (
    "load",
    "embed",
    "image front end",
    "norms, residuals",
    "attention",
    "MLP",
    "head + loss",
    "optimiser",
    "HET recording",
    "evaluation, checkpoints",
    "other",
)
_BACKWARD = "autograd::engine::evaluate_function"
_OPERATORS = 12


@dataclass
class PartTime:
    """Milliseconds per step.

    Attributes:
        part: one of `PARTS`.
        forward_ms, backward_ms: of the host; what is neither (load, optimiser) counts as forward.
        device_ms: of the kernels on a GPU that this part started.
    """

    part: str
    forward_ms: float = 0.0
    backward_ms: float = 0.0
    device_ms: float = 0.0

    @property
    def ms(self) -> float:
        """Of the host, in all."""
        return self.forward_ms + self.backward_ms


@dataclass
class OperatorTime:
    """An operator's own time in one part, milliseconds and calls per step."""

    part: str
    operator: str
    ms: float = 0.0
    calls: float = 0.0


@dataclass
class ProfileTable:
    """Where a step's time goes.

    Attributes:
        steps: that were profiled.
        device: the model's.
        parts: those that ran.
        operators: the slowest ones.
    """

    steps: int
    device: str
    parts: list[PartTime]
    operators: list[OperatorTime] = field(default_factory=list)

    def share(self, row: PartTime) -> float:
        """A part's share of a step, of the kernels' time where there are kernels."""
        name = "device_ms" if any(part.device_ms for part in self.parts) else "ms"
        return getattr(row, name) / (sum(getattr(part, name) for part in self.parts) or 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        parts = [asdict(row) | {"ms": row.ms, "share": self.share(row)} for row in self.parts]
        step = sum(row.ms for row in self.parts)
        operators = [asdict(row) for row in self.operators]
        return {"steps": self.steps, "device": self.device, "step_ms": step, "parts": parts, "operators": operators}

    def text(self) -> str:
        """The table to be read."""
        gpu = any(row.device_ms for row in self.parts)
        step = sum(row.ms for row in self.parts)
        head = f"{'part':<24}{'forward':>10}{'backward':>10}{'ms/step':>10}"
        lines = [f"{self.steps} steps on {self.device}, {step:.1f} ms a step while profiled", ""]
        lines.append(head + (f"{'GPU ms':>10}" if gpu else "") + f"{'share':>8}")
        for row in self.parts:
            numbers = [row.forward_ms, row.backward_ms, row.ms, *([row.device_ms] if gpu else [])]
            lines.append(f"{row.part:<24}" + "".join(f"{x:>10.2f}" for x in numbers) + f"{self.share(row):>8.1%}")
        lines += ["", f"{'slowest operators':<40}{'part':<24}{'ms/step':>10}{'calls':>8}"]
        for one in self.operators:
            lines.append(f"{one.operator[:38]:<40}{one.part:<24}{one.ms:>10.2f}{one.calls:>8.1f}")
        return "\n".join(lines) + "\n"


def profile_table(events: Iterable[Any], steps: int, device: str) -> ProfileTable:
    """The table of `events` (``torch.profiler.profile.events()``) of so many steps, each inside one range ``other``."""
    host = [event for event in events if event.device_type.name == "CPU" and not event.is_async]
    roots = [event for event in host if event.cpu_parent is None]
    creators: dict[int, str] = {}
    # An operator that makes no backward function carries the number that the next one to make one will have.
    for event, part, backward in sorted(_walk(roots, {}), key=lambda item: item[0].time_range.start):
        if not backward and event.sequence_nr >= 0 and not event.name.startswith(_BACKWARD):
            creators[event.sequence_nr] = part or "other"
    rows = {name: PartTime(name) for name in PARTS}
    operators: dict[tuple[str, str], OperatorTime] = {}
    for event, part, backward in _walk(roots, creators):
        if part is None:
            continue
        row = rows[part]
        own = event.self_cpu_time_total / 1e3 / steps
        kernels = sum(kernel.duration for kernel in event.kernels) / 1e3 / steps
        if backward:
            row.backward_ms += own
        else:
            row.forward_ms += own
        row.device_ms += kernels
        name = event.name if not event.name.startswith(PREFIX) else "(Python)"
        entry = operators.setdefault((part, name), OperatorTime(part, name))
        entry.ms += kernels if kernels else own
        entry.calls += 1 / steps
    slowest = sorted(operators.values(), key=lambda entry: -entry.ms)[:_OPERATORS]
    used = [row for row in rows.values() if row.ms or row.device_ms]
    return ProfileTable(steps, device, used, slowest)


def _walk(roots: Iterable[Any], creators: dict[int, str]) -> Iterator[tuple[Any, Any, bool]]:
    """Every event with its part (None outside of all steps) and whether it belongs to a backward pass."""
    stack: list[tuple[Any, Any, bool]] = [(event, None, False) for event in roots]
    while stack:
        event, part, backward = stack.pop()
        name = event.name
        if name.startswith(PREFIX):
            part = name.removeprefix(PREFIX)
        elif name.startswith("Optimizer."):
            part = "optimiser"
        elif name.startswith(_BACKWARD):
            # Backward of a GPU model runs in a thread of its own, outside of the step's range.
            part, backward = creators.get(event.sequence_nr, "other"), True
        yield event, part, backward
        stack += [(child, part, backward) for child in event.cpu_children]
