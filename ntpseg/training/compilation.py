"""``training.torch_compile: auto``: the decoder's layers are compiled where that pays, by measuring it in the run."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch._dynamo.exc import TorchDynamoException
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ntpseg.training.budget import TimeBudget

# Steps that are measured of each kind, after so many that warm it up.
MEASURED, WARM_UP = 6, 3
# What is left of training must be worth the minute or two that compiling takes.
MIN_SECONDS = 900.0
# Compiled steps must take less than this share of the others' time.
WORTH = 0.97


class CompileWherePays(TrainerCallback):
    """Times some steps, compiles every decoder layer, times as many again, and keeps what is quicker.

    Layers are alike, so that one is compiled and all use it ("regional compilation"). Where PyTorch cannot compile
    them, for want of a compiler for instance, training goes on as it was. All ranks decide alike, by the slowest.
    Weights and their names are untouched.

    Args:
        model: an `NTPSegModel`, not wrapped.
        budget: of minutes, where the run has one.
        now: the clock in seconds.

    Attributes:
        kept: whether the compiled layers were kept; None before it is decided.
        words: what was decided and why, the line that is shown.
        failure: the first line of what PyTorch said where it could not compile.
    """

    def __init__(
        self,
        model: Any,
        *,
        budget: TimeBudget | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.layers = list(model.backbone.layers)
        self.budget, self.now = budget, now
        self.kept: bool | None = None
        self.words = ""
        self._phase = "plain"
        self.failure = ""
        self._times: dict[str, list[float]] = {"plain": [], "compiled": []}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of a step."""
        if self.kept is None:
            self._started = self._time()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop it; compile or decide when there are enough."""
        if self.kept is not None:
            return
        times = self._times[self._phase]
        times.append(self._time() - self._started)
        if len(times) < WARM_UP + MEASURED:
            return
        plain = self._median("plain")
        if self._phase == "plain":
            steps = state.max_steps - state.global_step
            left = _largest(steps * plain if self.budget is None else self.budget.left(state.global_step, plain))
            if left < MIN_SECONDS:
                self._decide(False, f"{left:.0f} s of training are left, of which compiling would take too much", state)
                return
            for layer in self.layers:
                layer._compiled_call_impl = partial(self._call, layer, torch.compile(layer._call_impl))
            self._phase = "compiled"
            return
        failed = _largest(bool(self.failure))
        share = _largest(self._median("compiled") / plain)
        compiling = sum(times[:WARM_UP]) - WARM_UP * plain
        if failed:
            self._decide(False, f"it failed here: {self.failure or 'see the other ranks'}", state)
            return
        why = f"a step takes {share:.2f} of its time without, after {compiling:.0f} s of compiling"
        self._decide(share < WORTH, why, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the layers as they were: what is saved and decoded with has other shapes."""
        self._restore()

    def _decide(self, kept: bool, why: str, state: TrainerState) -> None:
        self.kept = kept
        if not kept:
            self._restore()
        self.words = f"torch.compile: {'kept' if kept else 'not used'}, {why}"
        if state.is_world_process_zero:
            print(self.words, file=sys.stderr)

    def _call(self, layer: Any, compiled: Callable[..., Any], *arguments: Any, **kwargs: Any) -> Any:
        """A layer's call. Evaluation and decoding have other shapes, for which they would compile again."""
        if not layer.training or self.failure:
            return layer._call_impl(*arguments, **kwargs)
        try:
            return compiled(*arguments, **kwargs)
        except TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)
            self.failure = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
            return layer._call_impl(*arguments, **kwargs)

    def _restore(self) -> None:
        for layer in self.layers:
            layer._compiled_call_impl = None

    def _median(self, phase: str) -> float:
        return statistics.median(self._times[phase][WARM_UP:])

    def _time(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self.now()


def _largest(value: float) -> float:
    """The largest of all ranks' values."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return float(shared)
