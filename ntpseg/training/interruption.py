"""A scheduler that takes the machine back: save a checkpoint after the current step, and end well.

Slurm, Kubernetes and spot instances send SIGTERM (Slurm on request another signal) some time before they kill. The
first one is remembered; at the end of the step, on which the ranks agree in the reduction that they do anyway, every
rank saves and leaves. A second one acts as it would without this module.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class TrainingInterrupted(Exception):
    """Training ended early because it was asked to; a checkpoint of its last step is there.

    Attributes:
        step: of the checkpoint.
        name: of the signal, for example "SIGTERM"; of the first rank that had one.
    """

    def __init__(self, step: int, name: str) -> None:
        super().__init__(f"{name} after step {step}")
        self.step, self.name = step, name


class Interruption:
    """Remembers the first signal while it is entered; only in the main thread, which alone may handle signals."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        self.signal = None
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)


class SaveAndLeave(TrainerCallback):
    """Saves a checkpoint at the end of the step after which `asked` names a signal, and then raises.

    Args:
        asked: the signal's name once all ranks know of it, else None.
    """

    def __init__(self, asked: Callable[[], str | None]) -> None:
        self.asked = asked

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Have a checkpoint written now, and no evaluation before it: time is short."""
        if self.asked() is not None:
            control.should_save, control.should_evaluate = True, False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The checkpoint is whole.

        Raises:
            TrainingInterrupted: that was what training was asked for.
        """
        # from here, and not by stopping the loop, whose end would count the epoch as done
        name = self.asked()
        if name is not None:
            raise TrainingInterrupted(state.global_step, name)
