"""`NTPSegTrainer`: Hugging Face's Trainer with exact accumulation, hard error tokens and each loss term logged."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from ntpseg.generation.options import NonFiniteOutput
from ntpseg.losses import NumItems, count_items
from ntpseg.memory import HardTokenMemory, HardTokens
from ntpseg.training.budget import TimeBudget
from ntpseg.training.callbacks import evaluation_due, moved_position
from ntpseg.training.checkpoint import (
    begin,
    check_resumable,
    finish,
    last_checkpoint,
    load_memory,
    rotate,
    save_memory,
)
from ntpseg.training.config import OptimizerConfig
from ntpseg.training.dataset import EpochDataset, EpochSampler, ignore_padding
from ntpseg.training.divergence import CURE, MicroBatch, TrainingDiverged, check_weights, judge_step
from ntpseg.training.ema import WeightAverage
from ntpseg.training.loss_means import EvaluationMeans, LossMeans
from ntpseg.training.muon import Muon, split_parameters
from ntpseg.training.pickles import weights_only

LOSS_TERMS = ("ntp", "nktp", "tcl", "het")
# Only of models that have losses on pixels.
DENSE_TERMS = ("dice", "pixel", "soft")


class NTPSegTrainer(Trainer):
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
      and evaluation.
    - Muon as an optimizer, and an average of the weights that is evaluated in their place.

    Args:
        memory: where hard error tokens are kept; None switches HET off.
        budget: ends training by the clock and schedules the learning rate; None: the Trainer's own schedule.
        generation_metrics: scores of freely decoded masks, given the model; called at each evaluation (not under
            ZeRO-3, where no rank holds all weights). None leaves them out.
        optimizer_options: the optimizer and the average of the weights, see `OptimizerConfig`.
        max_skipped_steps: so many skipped steps in a row end training.
        **kwargs: see `transformers.Trainer`.
    """

    train_dataset: EpochDataset

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
        super().__init__(*args, **kwargs)
        # With the filter the Trainer logs a loss of 0 in place of NaN.
        self.args.logging_nan_inf_filter = False
        self.optimizer_options = optimizer_options or OptimizerConfig()
        config = cast(Any, self.model).config
        dense = getattr(config, "dense_loss", None) or {}
        used = tuple(name for name in DENSE_TERMS if dense.get(name))
        self._terms = LOSS_TERMS + used
        self.average = None
        if self.optimizer_options.ema:
            if self.shares_weights:
                raise ValueError("optimizer.ema must be 0 where ranks share the weights (ZeRO-3, FSDP)")
            self.average = WeightAverage(cast(Any, self.model), self.optimizer_options.ema)
        self.memory, self.budget, self.generation_metrics = memory, budget, generation_metrics
        self._generation_scores: dict[str, float] = {}
        weights = {"nktp": 1.0, "tcl": config.tcl_weight, "het": config.het_weight, **{n: dense[n] for n in used}}
        self._means = LossMeans(self._terms, self.args.world_size)
        self._evaluation_means = EvaluationMeans(weights, used, self.args.world_size)
        self._evaluating = False
        self.max_skipped_steps, self.skipped_in_row = max_skipped_steps, 0
        self._step: list[MicroBatch] = []
        self._step_sums = torch.zeros(0)
        self._supervised = torch.zeros(())
        self._gradient_norm: Tensor | float | None = None
        self._steps_counted, self._moved = 0, False
        self._skip_reason: str | None = None
        self._save_due = False
        self._evaluation_due = False
        self._matrix_parameters: int | None = None
        self.add_callback(_Epochs(self))
        if budget is not None:
            self.add_callback(budget)

    @property
    def shares_weights(self) -> bool:
        """Whether each rank holds only a part of the weights (ZeRO-3, FSDP)."""
        return bool(self.is_fsdp_enabled or is_deepspeed_zero3_enabled())

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or go on from the checkpoint at a path, hard-token memory included.

        Raises:
            ValueError: there is no batch, no step was taken, or the checkpoint is none, or none of this model's.
            TrainingDiverged: too many steps in a row had to be skipped, or weights are not finite.
        """
        self._step, self._steps_counted, self._moved, self.skipped_in_row, self._save_due = [], 0, False, 0, False
        self._means.reset()
        checkpoint = self._restore(resume_from_checkpoint) if resume_from_checkpoint else None
        try:
            # The best checkpoint may be read at the end, even where none is at the beginning.
            with weights_only():
                result = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
        except BaseException:
            self._close_bars()
            raise
        if not self._steps_counted and not (resume_from_checkpoint and self.state.global_step):
            raise ValueError(
                f"training must take at least one step, got none (num_train_epochs={self.args.num_train_epochs:g}, "
                f"max_steps={self.args.max_steps})"
            )
        if self._steps_counted and not self._moved:
            self._warn("every step had a learning rate of 0: the weights are those of the start")
        if self.budget is not None and self.state.global_step < self.state.max_steps and (self.state.epoch or 0) < 1:
            self._warn(
                f"max_minutes ended training after step {self.state.global_step} of {self.state.max_steps}, before "
                "every sample was seen once"
            )
        return result

    def _restore(self, resume_from_checkpoint: Any) -> Path:
        """Take from a checkpoint what the Trainer does not; the checkpoint's path."""
        checkpoint = last_checkpoint(self._run) if resume_from_checkpoint is True else Path(resume_from_checkpoint)
        if checkpoint is None:
            raise ValueError(f"resume must find a checkpoint in {self._run}, got none")
        check_resumable(checkpoint, self.args.process_index)
        self._means.load(checkpoint, self.args.device, own=self.is_world_process_zero())
        if self.memory is not None:
            config = cast(Any, self.model).config
            load_memory(
                self.memory,
                checkpoint,
                self.args.process_index,
                self.args.world_size,
                vocab_size=config.vocab_size,
                length=getattr(config.text_config, "max_position_embeddings", None),
            )
        if self.average is not None:
            self.average.load(checkpoint)
        return checkpoint

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
        """The Trainer's optimizer, or Muon."""
        options = self.optimizer_options
        if options.name == "adamw" or self.optimizer is not None:
            return super().create_optimizer(*args, **kwargs)
        if self.is_fsdp_enabled:
            raise ValueError("optimizer.name must be adamw with FSDP, which divides the matrices, got 'muon'")
        matrices, decayed, plain = split_parameters(cast(Any, self.model))
        self.optimizer = Muon(
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
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's schedule, or the time budget's."""
        if self.budget is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            self.lr_scheduler = self.budget.scheduler(cast(Any, optimizer or self.optimizer), num_training_steps)
        return self.lr_scheduler

    # ---- data

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, EpochDataset):
            return super()._get_train_sampler(dataset)
        return EpochSampler(dataset, self._samples_of_ranks(self._train_batch_size))

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if not isinstance(eval_dataset, EpochDataset):
            return super()._get_eval_sampler(eval_dataset)
        return EpochSampler(eval_dataset, self._samples_of_ranks(self.args.eval_batch_size), shuffle=False)

    def _samples_of_ranks(self, batch_size: int) -> int:
        """Of what the samples must be a multiple, so that none is repeated to give each rank as many batches."""
        if self.args.world_size == 1 or self.args.dataloader_drop_last:
            return 1
        return batch_size if self.accelerator.split_batches else batch_size * self.args.world_size

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of a training step and their counts; the Trainer calls it for training alone."""
        self._step, self._step_sums, self._gradient_norm = [], torch.zeros(0), None
        return super().get_batch_samples(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """The counts of all micro-batches of a step over all ranks; adds each micro-batch's hard tokens on the way.

        Whose step it is decides, not the mode of the model: that is still evaluation's in the step after one.
        """
        if not batch_samples or self._evaluating:
            return None
        model: Any = self.model
        config, heads = model.config, model.config.num_heads_k
        counts = torch.zeros(heads + 2, dtype=torch.float64, device=device)
        for batch in batch_samples:
            ignore_padding(batch)
            het = None
            if self.memory is not None:
                het = self.memory.lookup(batch["sample_ids"])
                batch["het_position"], batch["het_token"] = het.position, het.token
                het = HardTokens(het.position.to(device), het.token.to(device))
            rows, entries, images = self._count(batch["labels"].to(device), het)
            counts[:heads] += rows
            counts[heads] += entries
            counts[heads + 1] += images
        if self.args.world_size > 1:
            dist.all_reduce(counts)
        if config.dense_loss is not None:
            for batch in batch_samples:
                batch["num_images"] = counts[heads + 1].to(torch.float32)
        self._supervised = counts[:heads].sum()
        return NumItems(counts[:heads], counts[heads])

    def _count(self, labels: Tensor, het: HardTokens | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Rows ``[k]``, hard tokens and images of a batch, float64."""
        config = cast(Any, self.model).config
        span = None if config.vocab_range is None else tuple(config.vocab_range)
        items = count_items(labels, config.num_heads_k, het=het, vocab_range=span)
        return cast(Tensor, items.rows), cast(Tensor, items.het), (labels != -100).any(1).sum().double()

    # ---- loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of one micro-batch: its part of the whole step's, or in evaluation its own."""
        inputs = dict(inputs)
        sample_ids = inputs.pop("sample_ids")
        outputs = model(**inputs, num_items=num_items_in_batch)
        self._collect(sample_ids, inputs["labels"], outputs)
        loss = outputs["loss"]
        if num_items_in_batch is not None:
            # Ranks average their gradients, and the counts are those of all ranks together.
            loss = loss * self.args.world_size
            if self._optimizer_skips:
                # DeepSpeed and a loss scaler skip a step of which any gradient is not finite, and nothing else.
                usable = loss.detach().isfinite() & (self._supervised > 0)
                loss = loss * torch.where(usable, 1.0, math.nan)
        return (loss, outputs) if return_outputs else loss

    @property
    def _optimizer_skips(self) -> bool:
        return bool(self.is_deepspeed_enabled or self.args.fp16)

    @torch.no_grad()
    def _collect(self, sample_ids: Tensor, labels: Tensor, outputs: Any) -> None:
        """Keep what logs and the hard-token memory take from a micro-batch."""
        prediction = outputs["prediction"]
        supervised = prediction >= 0
        correct = (supervised & (prediction == labels)).sum()
        if self._evaluating:
            rows, entries, images = self._count(labels)
            weights = cast(Any, self.model).config.head_weights or [1.0] * len(rows)
            total = (rows * rows.new_tensor(weights)).sum()
            counts = {"ntp": rows[0], "nktp": total, "tcl": total, "het": entries} | dict.fromkeys(DENSE_TERMS, images)
            terms = {name: outputs[name] for name in self._terms}
            self._evaluation_means.add(terms, counts, correct, supervised.sum())
            return
        values = torch.stack([outputs[name].double() for name in ("loss", *self._terms)])
        row = torch.cat([values, torch.stack([correct, supervised.sum()]).double()])
        self._step_sums = self._step_sums + row if len(self._step_sums) else row
        self._step.append(MicroBatch(sample_ids, labels, prediction, outputs["nll"], outputs["margin"], values))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's; of a loss that is not finite nothing enters its own sum, which ours replace in the logs."""
        loss = super().training_step(*args, **kwargs)
        return torch.where(loss.isfinite(), loss, torch.zeros_like(loss))

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self._gradient_norm = super()._get_grad_norm(*args, **kwargs)
        return self._gradient_norm

    def _settle_step(self) -> None:
        """Count the step whose gradient is ready, or have it skipped."""
        # A loss scaler expects gradients that overflow and finds its scale by them.
        norm = None if self.args.fp16 else self._gradient_norm
        reason = judge_step(self._step, self._means.names, norm, self._supervised, world_size=self.args.world_size)
        self._skip_reason = reason
        if reason is None:
            self.skipped_in_row = 0
            self._steps_counted += 1
            self._moved |= any(group["lr"] > 0 for group in cast(Any, self.optimizer).param_groups)
            self._means.steps += 1
            self._means.add(self._step_sums)
            if self.memory is not None:
                for batch in self._step:
                    self.memory.record(batch.sample_ids, batch.prediction, batch.labels, batch.margin)
        else:
            self.skipped_in_row += 1
            if not self._optimizer_skips:
                # Without gradients optimizers leave weights and their own state alone, decay included.
                cast(Any, self.model).zero_grad(set_to_none=True)
        self._step = []

    def _report_skipped(self, reason: str) -> None:
        step = self.state.global_step
        message = f"step {step} skipped: {reason}"
        due = self.control.should_log
        self.log({"skipped": message})  # type: ignore[dict-item]  # callbacks know texts too
        # That was not the log of figures, which the step may still be due.
        self.control.should_log = due
        self._warn(message)
        if self.skipped_in_row >= self.max_skipped_steps:
            last = last_checkpoint(Path(str(self.args.output_dir)))
            raise TrainingDiverged(
                f"training stopped after {self.skipped_in_row} skipped steps in a row, the last of them step {step}: "
                f"{reason}; {CURE}; last checkpoint: {'none' if last is None else last.name}"
            )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 operations per token and matrix parameter; counted once, the Trainer would count parameters every step."""
        if self._matrix_parameters is None:
            model: Any = self.model
            self._matrix_parameters = model.num_parameters(exclude_embeddings=True)
        return 6 * inputs["input_ids"].numel() * self._matrix_parameters

    # ---- logging and saving

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's evaluation, with the scores of decoded masks."""
        pause = nullcontext() if self.budget is None else self.budget.evaluation()
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with pause, torch.random.fork_rng(devices), self.averaged_weights():
            self._generation_scores = {}
            if self.generation_metrics is not None and not self.shares_weights:
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

    def _warn(self, message: str) -> None:
        if self.is_world_process_zero():
            tqdm.write(f"ntpseg: {message}", file=sys.stderr)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, with the loss and its terms over all samples instead of the mean of the batches."""
        prefix = kwargs.get("metric_key_prefix", "eval")
        self._evaluation_means.pop()
        self._evaluating = True
        try:
            output: Any = super().evaluation_loop(*args, **kwargs)
            output.metrics.update({f"{prefix}_{name}": value for name, value in self._evaluation_means.pop().items()})
        finally:
            self._evaluating = False
        return output

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, on a batch whose padding has no labels."""
        inputs = dict(inputs)
        ignore_padding(inputs)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # Nothing compares as better than a NaN, which would stay the best for ever.
        if all(math.isfinite(value) for value in metrics.values() if isinstance(value, float)):
            return super()._determine_best_metric(metrics, trial)
        return False

    def averaged_weights(self) -> AbstractContextManager[None]:
        """A block in which the model has the averaged weights, where there is an average."""
        return nullcontext() if self.average is None else self.average.applied(cast(Any, self.model))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss terms: means over the steps since the last log that counted, over all ranks.

        What is not finite is logged as None, which is null in JSON.
        """
        if "loss" in logs:
            logs.update(self._means.pop())
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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's.

        Raises:
            TrainingDiverged: the weights are not finite; nothing is written.
        """
        if not _internal_call:
            check_weights(cast(Any, self.model), "the model", world_size=self.args.world_size)
        super().save_model(output_dir, _internal_call)

    @property
    def _run(self) -> Path:
        return Path(str(self.args.output_dir))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.skipped_in_row:
            # The weights may be what makes steps fail: older checkpoints must not make room for them.
            self._save_due = True
            return
        folder = self._run / f"checkpoint-{self.state.global_step}"
        check_weights(cast(Any, self.model), folder.name, world_size=self.args.world_size)
        if self.args.should_save:
            begin(folder)
        self.wait_for_ranks()
        self._means.save(folder, write=self.is_world_process_zero())
        if self.memory is not None:
            save_memory(self.memory, folder, self.args.process_index)
        if self.average is not None and self.is_world_process_zero():
            self.average.save(folder)
        # The Trainer would remove older checkpoints before the other ranks have written this one.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.wait_for_ranks()
        if self.args.should_save:
            finish(folder)
            rotate(self._run, limit, self.state.best_model_checkpoint)

    def wait_for_ranks(self) -> None:
        """Return when every rank has come here."""
        if self.args.world_size > 1:
            dist.barrier()

    # ---- resuming

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """The Trainer warns of weights that a checkpoint lacks, and goes on with those that the model has."""
        model: Any = self.model
        missing = sorted(set(load_result.missing_keys) - set(model._tied_weights_keys or ()))
        for name, reason in [(n, "without") for n in missing] + [(n, "with") for n in load_result.unexpected_keys]:
            raise ValueError(f"checkpoint must hold the weights of this model, got one {reason} {name!r}")

    def _load_rng_state(self, checkpoint: Any) -> None:
        super()._load_rng_state(checkpoint)
        # Here the state is that of the unbroken run before the evaluation.
        if self._evaluation_due:
            self._make_up_evaluation()

    def _make_up_evaluation(self) -> None:
        self._evaluation_due = False
        self._evaluate(None, None)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= self.state.max_steps:
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
        memory = self.trainer.memory
        # A checkpoint of an epoch's very last step was written before that epoch's end.
        while memory is not None and memory.epoch < _epoch(state) + 1:
            self._advance(memory)
        if state.is_world_process_zero and (moved := moved_position(args, state, kwargs["train_dataloader"])):
            print(moved, file=sys.stderr)
        self.trainer._evaluation_due = evaluation_due(args, state)
        if self.trainer._evaluation_due and state.global_step >= state.max_steps:
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
        if trainer._skip_reason is not None:
            trainer._report_skipped(trainer._skip_reason)
            return
        if trainer.average is not None and not trainer.accelerator.optimizer_step_was_skipped:
            trainer.average.update(cast(Any, trainer.model))
        if trainer._save_due:
            control.should_save, trainer._save_due = True, False

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
