"""``training.profile_steps=N``: a trace of N steps and a table of where their time goes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ntpseg.training.profile_table import profile_table
from ntpseg.utils.files import write_json, write_text
from ntpseg.utils.ranges import part, profiling

FOLDER, TRACE = "profile", "trace.json.gz"
# The first steps load libraries, fill caches and find the quickest kernels.
_WARMUP = 3
# Attributes of Hugging Face's decoder layers.
_LAYER_PARTS = {"self_attn": "attention", "mlp": "MLP"}


class ProfileSteps(TrainerCallback):
    """Profiles steps on rank 0 and writes ``RUN/profile``: ``trace.json.gz``, ``parts.txt`` and ``parts.json``.

    It starts after three steps of this process (or as many as leave one to profile). Ranges inside the model are hooks
    that exist only meanwhile, so a run that is not profiled pays nothing.

    Args:
        run: the run's directory.
        steps: N, at least 1.
        pause: a block in which the clock of training stands still, see `Throughput.pause`.
    """

    def __init__(self, run: Path, steps: int, pause: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self.folder, self.steps, self.pause = run / FOLDER, steps, pause
        self._profiler: Any = None
        self._step: Any = None
        self._handles: list[Callable[[], Any]] = []
        self._done = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Work out the first step to profile."""
        self._done = 0
        left = state.max_steps - state.global_step
        self._first = state.global_step + max(0, min(_WARMUP, left - self.steps, left - 1))
        if state.is_world_process_zero and self._first == state.global_step and left > 0:
            self._start(kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start, count or end."""
        if not state.is_world_process_zero:
            return
        if self._profiler is not None:
            self._done += 1
            self._end_step()
            if self._done >= self.steps:
                with self.pause():
                    self._finish(args)
            else:
                self._begin_step()
        elif not self._done and state.global_step >= self._first:
            self._start(kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write what there is, where training ended early."""
        if self._profiler is not None:
            self._end_step()
            self._finish(args)

    def abort(self) -> None:
        """End without a file, where training has failed."""
        if self._profiler is not None:
            self._end_step()
            self._stop()

    def _stop(self) -> Any:
        profiler, self._profiler = self._profiler, None
        profiling(False)
        for remove in self._handles:
            remove()
        self._handles = []
        profiler.stop()
        return profiler

    def _start(self, model: Any) -> None:
        from torch.profiler import ProfilerActivity, profile, supported_activities

        wanted = {ProfilerActivity.CPU, ProfilerActivity.CUDA} & set(supported_activities())
        self._profiler = profile(activities=wanted)
        self._profiler.start()
        profiling(True)
        self._handles = mark_modules(model)
        self._begin_step()

    def _begin_step(self) -> None:
        self._step = part("other")
        self._step.__enter__()

    def _end_step(self) -> None:
        self._step.__exit__(None, None, None)

    def _finish(self, args: TrainingArguments) -> None:
        profiler = self._stop()
        if not self._done:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / TRACE))
        table = profile_table(profiler.events(), self._done, args.device.type)
        write_json(self.folder / "parts.json", table.to_dict())
        write_text(self.folder / "parts.txt", table.text())
        print(f"profile of {self._done} steps: {self.folder / 'parts.txt'}", file=sys.stderr)


def mark_modules(model: Any) -> list[Callable[[], Any]]:
    """Put the parts of an `NTPSegModel` into ranges; returns what takes the hooks away again."""
    backbone = model.backbone
    named = [(backbone.embed_tokens, "embed"), (model.grid, "embed"), (model.front_end, "image front end")]
    named += [(backbone.norm, "norms, residuals"), (getattr(backbone, "rotary_emb", None), "attention")]
    named += [(model.heads, "head + loss")]
    for layer in backbone.layers:
        named.append((layer, "norms, residuals"))
        named += [(getattr(layer, name, None), label) for name, label in _LAYER_PARTS.items()]
    open_ranges: list[Any] = []

    def enter(label: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            open_ranges.append(part(label))
            open_ranges[-1].__enter__()

        return hook

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    extra: Any = model.mask_training
    dense = extra.dense_losses

    def dense_losses(*args: Any, **kwargs: Any) -> Any:
        with part("head + loss"):
            return dense(*args, **kwargs)

    extra.dense_losses = dense_losses
    handles: list[Callable[[], Any]] = [lambda: vars(extra).pop("dense_losses")]
    for module, label in named:
        if module is not None:
            handles.append(module.register_forward_pre_hook(enter(label), prepend=True).remove)
            handles.append(module.register_forward_hook(leave, always_call=True).remove)
    return handles
