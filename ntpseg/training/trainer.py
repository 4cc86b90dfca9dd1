"""`NTPSegTrainer`: Hugging Face's Trainer with exact accumulation, hard error tokens and each loss term logged."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ntpseg.generation.options import NonFiniteOutput
from ntpseg.memory import HardTokenMemory
from ntpseg.models.sharded_init import SHARDS
from ntpseg.training.budget import TimeBudget
from ntpseg.training.callbacks import evaluation_due, moved_position
from ntpseg.training.checkpointing import CheckpointTrainer
from ntpseg.training.config import OptimizerConfig
from ntpseg.training.divergence import CURE, TrainingDiverged, check_weights
from ntpseg.training.interruption import SaveAndLeave
from ntpseg.training.muon import Muon, split_parameters
from ntpseg.training.parallelism import Parallelism
from ntpseg.training.pickles import weights_only
from ntpseg.training.profiling import ProfileSteps
from ntpseg.training.sharded_weights import is_fsdp2, shard_fsdp2, start_fsdp2_on_cpu


class NTPSegTrainer(CheckpointTrainer):
    """Trains an `NTPSegModel` on an `EpochDataset`.

    What it adds to the Trainer:

    - Each loss is divided by the counts of the whole accumulated batch over all ranks (`NumItems`), so that neither
      accumulation nor the number of ranks changes the gradient. What fills up the last batch of a rank counts nothing.
      The loss of an evaluation is likewise that of all its samples, whatever the batches.
    - A step whose loss or gradient is not finite, or that supervises no label, is skipped and reported; too many of
      them in a row end training (`TrainingDiverged`). Weights that are not finite are never saved.
    - Evaluation leaves the random numbers of training as they were.
    - Hard error tokens: looked up for each batch, recorded after it, exchanged between ranks and advanced at the end of
      each epoch, saved with each checkpoint.
    - ntp, nktp, tcl, het, the losses on pixels and the token accuracy of head 0 are logged with the loss, in training
      and evaluation; in training with step time, tokens/s, FLOP/s, memory and waiting for data (`Throughput`).
    - Muon as an optimizer, and an average of the weights that is evaluated in their place.

    Args:
        memory: where hard error tokens are kept; None switches HET off.
        budget: ends training by the clock and schedules the learning rate; None: the Trainer's own schedule.
        generation_metrics: scores of freely decoded masks, given the model; called at each evaluation (not under
            ZeRO-3, FSDP and sequence parallelism, where no rank decodes alone). None leaves them out.
        optimizer_options: the optimizer and the average of the weights, see `OptimizerConfig`.
        max_skipped_steps: so many skipped steps in a row end training.
        **kwargs: see `transformers.Trainer`.
    """

    def __init__(
        self,
        *args: Any,
        memory: HardTokenMemory | None = None,
        budget: TimeBudget | None = None,
        generation_metrics: Callable[[Any], dict[str, float]] | None = None,
        optimizer_options: OptimizerConfig | None = None,
        max_skipped_steps: int = 5,
        **kwargs: Any,
    ) -> None:
        options = optimizer_options or OptimizerConfig()
        super().__init__(
            *args,
            memory=memory,
            max_skipped_steps=max_skipped_steps,
            optimizer_options=options,
            budget=budget,
            **kwargs,
        )
        self.generation_metrics = generation_metrics
        self._generation_scores: dict[str, float] = {}
        self._matrix_parameters: int | None = None
        self.add_callback(_Epochs(self))
        self.add_callback(SaveAndLeave(lambda: self._asked))
        if budget is not None:
            self.add_callback(budget)

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's; FSDP2 also on CPUs, and of a model whose weights are this rank's shards alone."""
        super().create_accelerator_and_postprocess()
        if is_fsdp2(self.args) and not self.is_fsdp_enabled and self.args.device.type == "cpu":
            start_fsdp2_on_cpu(self.accelerator, self.args)
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled and hasattr(self.model, SHARDS):
            shard_fsdp2(self.model, self.accelerator)

    @property
    def decodes_alone(self) -> bool:
        """Whether this rank can decode masks without the others: it has all weights and whole sequences."""
        return not self.shares_weights and self.sequence_parallel_size == 1

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or go on from the checkpoint at a path, hard-token memory included.

        The checkpoint may be of another number of ranks or another kind of sharding, see `ntpseg.training.resharding`.

        Raises:
            ValueError: there is no batch, no step was taken, or the checkpoint is none, or none of this model's, or its
                state cannot be converted to this number of ranks and this kind of sharding.
            TrainingDiverged: too many steps in a row had to be skipped, or weights are not finite.
            TrainingInterrupted: SIGTERM or SIGUSR1 came (to any rank); a checkpoint of the step then was saved.
        """
        self._step, self._steps_counted, self._moved, self.skipped_in_row, self._asked = [], 0, False, 0, None
        self._overflows = 0
        self._means.reset()
        self.throughput.reset()
        checkpoint = self._restore(resume_from_checkpoint)
        try:
            # The best checkpoint may be read at the end, even where none is at the beginning.
            with weights_only(), self._interruption:
                result = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
        except BaseException:
            self._close_bars()
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProfileSteps):
                    callback.abort()
            raise
        if not self._steps_counted and not (resume_from_checkpoint and self.state.global_step):
            raise ValueError(
                f"training must take at least one step, got none (num_train_epochs={self.args.num_train_epochs:g}, "
                f"max_steps={self.args.max_steps})"
            )
        if not self._steps_counted:
            last = f"training ends with {self.state.max_steps}"
            if self._is_spent:
                last = "the minutes of max_minutes were spent"
            self._warn(f"no step was left to train: the checkpoint is of step {self.state.global_step}, and {last}")
        elif not self._moved:
            why = "a learning rate of 0" + (" or a gradient that overflowed" if self.args.fp16 else "")
            self._warn(f"every step had {why}: the weights are those of the start")
        if self.budget is not None and self.state.global_step < self.state.max_steps and (self.state.epoch or 0) < 1:
            self._warn(
                f"max_minutes ended training after step {self.state.global_step} of {self.state.max_steps}, before "
                "every sample was seen once"
            )
        return result

    def _close_bars(self) -> None:
        # An open bar would swallow the first line of the message that follows.
        for callback in self.callback_handler.callbacks:
            for bar in (getattr(callback, "training_bar", None), getattr(callback, "prediction_bar", None)):
                if bar is not None:
                    bar.close()

    def get_train_dataloader(self) -> Any:
        """The Trainer's, with a batch in it.

        Raises:
            ValueError: there is none.
        """
        size = len(self.train_dataset)
        loader = super().get_train_dataloader() if size else None
        if loader is None or not len(loader):
            raise ValueError(
                f"training must have at least one batch, got {size} samples for batches of "
                f"{self.args.train_batch_size} on {self.args.world_size} ranks with "
                f"dataloader_drop_last={self.args.dataloader_drop_last}"
            )
        return loader

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's optimizer, or Muon.

        Raises:
            ValueError: Muon is asked for, and FSDP divides the matrices.
        """
        if self.optimizer_options.name == "muon" and self.optimizer is None:
            if self.is_fsdp_enabled:
                raise ValueError("optimizer.name must be adamw with FSDP, which divides the matrices, got 'muon'")
            self.optimizer = self._muon()
        return super().create_optimizer(*args, **kwargs)

    def _muon(self) -> Muon:
        options = self.optimizer_options
        matrices, decayed, plain = split_parameters(cast(Any, self.model))
        return Muon(
            [
                {"params": matrices, "muon": True, "weight_decay": 0.0},
                {"params": decayed},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=self.args.learning_rate,
            muon_lr=options.muon_learning_rate,
            momentum=options.muon_momentum,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
            weight_decay=self.args.weight_decay,
        )

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's schedule, or the time budget's."""
        if self.budget is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            self.lr_scheduler = self.budget.scheduler(cast(Any, optimizer or self.optimizer), num_training_steps)
        return self.lr_scheduler

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 operations per token and matrix parameter; counted once, the Trainer would count parameters every step."""
        if self._matrix_parameters is None:
            model: Any = self.model
            self._matrix_parameters = model.num_parameters(exclude_embeddings=True)
        return 6 * inputs["input_ids"].numel() * self._matrix_parameters // self.sequence_parallel_size

    # ---- evaluation and logging

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's evaluation, with the scores of decoded masks."""
        pause = nullcontext() if self.budget is None else self.budget.evaluation()
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with self.throughput.pause(), pause, torch.random.fork_rng(devices), self.averaged_weights():
            self._generation_scores = {}
            if self.generation_metrics is not None and self.decodes_alone:
                try:
                    self._generation_scores = self.generation_metrics(self.model)
                except NonFiniteOutput as error:
                    self._warn(f"evaluation after step {self.state.global_step}: {error}")
            metrics = super().evaluate(*args, **kwargs)
        odd = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
        if odd:
            self._warn(
                f"evaluation after step {self.state.global_step}: {', '.join(odd)} must be finite, got nan or inf"
            )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss terms (means over the steps since the last log that counted, over all ranks) and the speed.

        What is not finite is logged as None, which is null in JSON.
        """
        if "loss" in logs:
            logs.update(self._means.pop())
            logs.update(self.throughput.pop())
            logs.update(self._exchange.pop())
        elif "eval_loss" in logs:
            logs.update({f"eval_{name}": value for name, value in self._generation_scores.items()})
        odd = {name for name, value in logs.items() if isinstance(value, float) and not math.isfinite(value)}
        if odd:
            logs = {name: cast(float, None) if name in odd else value for name, value in logs.items()}
        super().log(logs, start_time)

    @torch.no_grad()
    def check_result(self) -> None:
        """Refuse trained weights that are not finite or give a loss that is not; all ranks must call it alike.

        Raises:
            TrainingDiverged: they are.
        """
        check_weights(cast(Any, self.model), "the trained model", world_size=self.args.world_size)
        chosen = range(min(len(self.train_dataset), self.args.train_batch_size))
        inputs: Any = self._prepare_inputs(cast(Any, self.data_collator)([self.train_dataset[i] for i in chosen]))
        inputs.pop("sample_ids")
        wrapped: Any = self.model_wrapped if self.shares_weights else self.model
        wrapped.eval()
        with self.compute_loss_context_manager():
            outputs = wrapped(**inputs)
        if not bool(outputs["loss"].isfinite()):
            raise TrainingDiverged(
                f"the trained model must have a finite loss on its first {len(chosen)} training samples, "
                f"got {float(outputs['loss'])}; {CURE}"
            )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_spent or self.state.global_step >= self.state.max_steps:
            # A run that had ended; the Trainer would add a step.
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)


class _Epochs(TrainerCallback):
    """Tells the data set its epoch, advances the hard-token memory and averages the weights."""

    def __init__(self, trainer: NTPSegTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.start_average()
        if not state.global_step:
            self.trainer.seed_ranks()
        memory = self.trainer.memory
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        self.trainer.throughput.prepare(self.trainer.model, dtype, first=state.is_world_process_zero)
        # A checkpoint of an epoch's very last step was written before that epoch's end.
        while memory is not None and memory.epoch < _epoch(state) + 1:
            self._advance(memory)
        saved = self.trainer._saved
        # Where the global batch is the same, a step is the same place, whatever share of an epoch its log says.
        kept = saved is not None and saved.pairs == Parallelism.of(self.trainer).pairs
        moved = None if kept else moved_position(args, state, kwargs["train_dataloader"])
        if state.is_world_process_zero and moved:
            print(moved, file=sys.stderr)
        self.trainer._evaluation_due = evaluation_due(args, state)
        if self.trainer._evaluation_due and (self.trainer._is_spent or state.global_step >= state.max_steps):
            # No step follows whose random state would matter.
            self.trainer._make_up_evaluation()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.train_dataset.set_epoch(_epoch(state))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._settle_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.throughput.step()
        trainer._exchange.step(state.global_step)
        if trainer._skip_reason is not None:
            trainer._report_skipped(trainer._skip_reason)
            return
        skipped = trainer.accelerator.optimizer_step_was_skipped
        trainer._count_overflow(skipped)
        if trainer.average is not None and not skipped:
            trainer.average.update(cast(Any, trainer.model))
        if trainer._save_due:
            control.should_save, trainer._save_due = True, False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The process group must not end under an exchange.
        if self.trainer.memory is not None:
            self.trainer.memory.wait()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.memory is not None and not control.should_training_stop:
            self._advance(self.trainer.memory)

    @staticmethod
    def _advance(memory: HardTokenMemory) -> None:
        memory.sync()
        memory.advance()


def _epoch(state: TrainerState) -> int:
    return int((state.epoch or 0.0) + 1e-6)
