"""Callbacks that show and log metrics: progress bar, TensorBoard and one JSON line per log."""

from __future__ import annotations

import sys
from collections.abc import Sized
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ProgressCallback

from ntpseg.evaluation.run_directory import TRAINING_LOG, training_log
from ntpseg.training import throughput
from ntpseg.utils.files import json_text, write_jsonl

_SHOWN = ("loss", "ntp", "tcl", "het", "token_accuracy", "eval_loss", "eval_token_dice", "learning_rate")


class TrainingProgress(ProgressCallback):
    """A bar that shows the latest metrics, instead of printing a line for each log."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar; a file or pipe gets a line every 30 seconds."""
        if state.is_world_process_zero:
            every = 0.5 if sys.stderr.isatty() else 30.0
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="train", dynamic_ncols=True, mininterval=every
            )
            self.metrics: dict[str, str] = {}
        self.current_step = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the metrics of `logs` behind the bar."""
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {k: v for k, v in (logs or {}).items() if k in _SHOWN}
            self.metrics.update({k: "nan" if v is None else f"{v:.4g}" for k, v in shown.items()})
            self.metrics.update(throughput.shown(logs or {}))
            self.training_bar.set_postfix(self.metrics, refresh=False)


class RunTensorBoard(TensorBoardCallback):
    """TensorBoard files in RUN/logs; a resumed run replaces what came after its checkpoint."""

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.run = run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the writer."""
        if state.is_world_process_zero and self.tb_writer is None:
            purge = state.global_step + 1 if state.global_step else None
            self.tb_writer = self._SummaryWriter(log_dir=str(self.run / "logs"), purge_step=purge)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write what has a value; a figure that was not finite has none."""
        super().on_log(args, state, control, {k: v for k, v in (logs or {}).items() if v is not None}, **kwargs)


class JsonLog(TrainerCallback):
    """Appends each log to RUN/trainer_log.jsonl, one JSON object with ``step`` and ``epoch`` per line."""

    def __init__(self, run: Path) -> None:
        self.run, self.path = run, run / TRAINING_LOG

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the lines that a killed run wrote after the checkpoint from which training continues."""
        if not state.is_world_process_zero:
            return
        # An evaluation that is made up is logged anew.
        again = evaluation_due(args, state)
        lines = [line for line in training_log(self.run) if line["step"] <= state.global_step]
        write_jsonl(
            self.path,
            [line for line in lines if not (again and line["step"] == state.global_step and "eval_loss" in line)],
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line."""
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json_text({"step": state.global_step, **(logs or {})}) + "\n")


def evaluation_due(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the step of a checkpoint should have been evaluated and was not, which is to be made up then.

    A checkpoint that the last step of an epoch wrote is older than the evaluation, and a kill may have cut that off; a
    signal leaves it out, whatever the step.
    """
    step, epoch = state.global_step, state.epoch or 0.0
    if not step or any("eval_loss" in line and line["step"] == step for line in state.log_history):
        return False
    last = step >= state.max_steps
    if args.eval_strategy == IntervalStrategy.EPOCH:
        return args.eval_delay <= epoch and (last or abs(epoch - round(epoch)) < 1e-6)
    if args.eval_strategy == IntervalStrategy.STEPS:
        return args.eval_delay <= step and (last or step % state.eval_steps == 0)
    return False


def moved_position(args: TrainingArguments, state: TrainerState, batches: Sized) -> str | None:
    """A warning where a checkpoint's step is another place in the data now; None where it is the same.

    Args:
        args: of the run now.
        state: of the checkpoint.
        batches: of an epoch of this rank now.
    """
    steps = -(-len(batches) // args.gradient_accumulation_steps)
    epochs, rest = divmod(state.global_step, max(steps, 1))
    now, before = epochs + rest * args.gradient_accumulation_steps / max(len(batches), 1), state.epoch or 0.0
    if abs(now - before) < 1e-6:
        return None
    return (
        f"step {state.global_step} was epoch {before:.3f} and is {now:.3f} now, since a step takes another number of "
        "pairs: keep ranks x training.per_device_train_batch_size x training.gradient_accumulation_steps / "
        "training.sequence_parallel_size as it was"
    )
