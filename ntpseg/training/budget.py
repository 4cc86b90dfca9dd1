"""A budget of minutes: the learning rate falls with the clock, and training ends when the time is up."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ntpseg.utils.checks import check_number
from ntpseg.utils.files import write_json

# The learning rate at the end over its peak.
MIN_FACTOR = 0.02
_FILE = "budget.json"


class TimeBudget(TrainerCallback):
    """Cosine learning rate over the larger of the two fractions spent, of the steps or of the minutes.

    On a machine of unknown speed a schedule over steps would end too early or never. The price: two runs on machines
    of different speed are not the same run. A checkpoint keeps what was spent, and a resumed run has the rest; where it
    does not, as of an earlier release, the clock starts at the fraction of its steps.

    Args:
        minutes: of training.
        warmup_steps: linear warm-up.
        clock: "wall", in which evaluation counts, or "cpu", this process's processor time, in which it does not: the
            clock of comparisons, since what else the machine does changes it little.

    Attributes:
        is_spent: whether nothing was left when training went on.

    Raises:
        ValueError: the minutes are not above 0.
    """

    def __init__(self, minutes: float, warmup_steps: int = 50, clock: str = "wall") -> None:
        check_number("max_minutes", minutes, above=0)
        self.seconds, self.warmup_steps = 60.0 * minutes, warmup_steps
        self.clock = clock
        self.now = time.process_time if clock == "cpu" else time.monotonic
        self.started: float | None = None
        self._spent: float | None = None
        self.max_steps, self.is_spent = 1, False
        self._shared: float | None = None

    def fraction(self, step: int) -> float:
        """How much of the run is over after `step` steps, in [0, 1]."""
        clock = self._clock() if self._shared is None else self._shared
        return min(1.0, max(step / self.max_steps, clock))

    def _clock(self) -> float:
        return 0.0 if self.started is None else (self.now() - self.started) / self.seconds

    def left(self, step: int, seconds: float) -> float:
        """Seconds that training may still take after `step` steps, if each takes so many."""
        return min((1.0 - self._clock()) * self.seconds, (self.max_steps - step) * seconds)

    def factor(self, step: int) -> float:
        """The learning rate after `step` steps over its peak."""
        cosine = 0.5 * (1.0 + math.cos(math.pi * self.fraction(step)))
        return min(1.0, (step + 1) / max(1, self.warmup_steps)) * (MIN_FACTOR + (1.0 - MIN_FACTOR) * cosine)

    def scheduler(self, optimizer: Optimizer, max_steps: int) -> LambdaLR:
        """The scheduler of a run of at most `max_steps` steps."""
        self.max_steps = max(1, max_steps)
        return LambdaLR(optimizer, self.factor)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self.max_steps = max(1, state.max_steps)
        spent = self.seconds * state.global_step / self.max_steps if self._spent is None else self._spent
        self.started = self.now() - spent
        self._shared = None

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let all ranks read the first one's clock: by their own they would disagree on the rate and on the end."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            clock = torch.tensor(self._clock(), dtype=torch.float64, device=args.device)
            dist.broadcast(clock, 0)
            self._shared = float(clock)

    def save(self, checkpoint: Path) -> None:
        """Write the seconds spent so far into a checkpoint's folder."""
        write_json(checkpoint / _FILE, {"seconds": round(self._clock() * self.seconds, 3)})

    def load(self, checkpoint: Path | None) -> None:
        """Go on from what `save` wrote, as the next training begins; None: from nothing.

        Raises:
            ValueError: the file is not what `save` wrote.
        """
        self._spent, self.is_spent = None, False
        path = None if checkpoint is None else checkpoint / _FILE
        if path is None or not path.is_file():
            return
        try:
            self._spent = float(json.loads(path.read_text(encoding="utf-8"))["seconds"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} must say how many seconds were spent, got a damaged file ({error!r})") from error
        self.is_spent = self._spent >= self.seconds

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Around an evaluation: the processor's clock stands still."""
        before = self.now()
        yield
        if self.clock == "cpu" and self.started is not None:
            self.started += self.now() - before

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End training when the time is up."""
        if self.fraction(state.global_step) >= 1.0:
            control.should_training_stop = True
