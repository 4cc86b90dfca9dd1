"""`NTPSegTrainer`: Hugging Face's Trainer with exact accumulation, hard error tokens and each loss term logged."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

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
from ntpseg.training.dataset import EpochDataset, EpochSampler
from ntpseg.training.ema import WeightAverage
from ntpseg.training.muon import Muon, split_parameters
from ntpseg.training.pickles import weights_only

LOSS_TERMS = ("ntp", "nktp", "tcl", "het")
# Only of models that have losses on pixels.
DENSE_TERMS = ("dice", "pixel", "soft")


class NTPSegTrainer(Trainer):
    """Trains an `NTPSegModel` on an `EpochDataset`.

    What it adds to the Trainer:

    - Each loss is divided by the counts of the whole accumulated batch over all ranks (`NumItems`), so that neither
      accumulation nor the number of ranks changes the gradient.
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
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.optimizer_options = optimizer_options or OptimizerConfig()
        dense = getattr(cast(Any, self.model).config, "dense_loss", None) or {}
        self._terms = LOSS_TERMS + tuple(name for name in DENSE_TERMS if dense.get(name))
        self.average = None
        if self.optimizer_options.ema:
            if self.shares_weights:
                raise ValueError("optimizer.ema must be 0 where ranks share the weights (ZeRO-3, FSDP)")
            self.average = WeightAverage(cast(Any, self.model), self.optimizer_options.ema)
        self.memory, self.budget, self.generation_metrics = memory, budget, generation_metrics
        self._generation_scores: dict[str, float] = {}
        self._sums = {True: torch.zeros(0), False: torch.zeros(0)}
        self._logged_step = 0
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
        """Train, or go on from the checkpoint at a path, hard-token memory included."""
        if not resume_from_checkpoint:
            # The best checkpoint may be read at the end.
            with weights_only():
                return super().train(None, *args, **kwargs)
        checkpoint = last_checkpoint(self._run) if resume_from_checkpoint is True else Path(resume_from_checkpoint)
        if checkpoint is None:
            raise ValueError(f"resume must find a checkpoint in {self._run}, got none")
        check_resumable(checkpoint, self.args.process_index)
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
        with weights_only():
            return super().train(str(checkpoint), *args, **kwargs)

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
        return EpochSampler(dataset) if isinstance(dataset, EpochDataset) else super()._get_train_sampler(dataset)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """The counts of all micro-batches of a step over all ranks; adds each micro-batch's hard tokens on the way."""
        if not batch_samples:
            return None
        model: Any = self.model
        config, heads = model.config, model.config.num_heads_k
        counts = torch.zeros(heads + 2, dtype=torch.float64, device=device)
        for batch in batch_samples:
            het = None
            if self.memory is not None and model.training:
                het = self.memory.lookup(batch["sample_ids"])
                batch["het_position"], batch["het_token"] = het.position, het.token
                het = HardTokens(het.position.to(device), het.token.to(device))
            items = count_items(
                batch["labels"].to(device),
                heads,
                het=het,
                vocab_range=None if config.vocab_range is None else tuple(config.vocab_range),
            )
            counts[:heads] += cast(Tensor, items.rows)
            counts[heads] += cast(Tensor, items.het)
            counts[heads + 1] += len(batch["labels"])
        if self.args.world_size > 1:
            dist.all_reduce(counts)
        if config.dense_loss is not None:
            for batch in batch_samples:
                batch["num_images"] = counts[heads + 1].to(torch.float32)
        return NumItems(counts[:heads], counts[heads])

    # ---- loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of one micro-batch, its part of the whole step's."""
        inputs = dict(inputs)
        sample_ids = inputs.pop("sample_ids")
        outputs = model(**inputs, num_items=num_items_in_batch)
        labels, prediction = inputs["labels"], outputs["prediction"]
        with torch.no_grad():
            supervised = prediction >= 0
            correct = (supervised & (prediction == labels)).sum()
            row = [outputs[name].float() for name in self._terms] + [correct.float(), supervised.sum().float()]
            sums = self._sums[model.training]
            self._sums[model.training] = sums + torch.stack(row) if len(sums) else torch.stack(row)
        if self.memory is not None and model.training:
            self.memory.record(sample_ids, prediction, labels, outputs["margin"])
        loss = outputs["loss"]
        if num_items_in_batch is not None:
            # Ranks average their gradients, and the counts are those of all ranks together.
            loss = loss * self.args.world_size
        return (loss, outputs) if return_outputs else loss

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
        with pause, self.averaged_weights():
            if self.generation_metrics is not None and not self.shares_weights:
                self._generation_scores = self.generation_metrics(self.model)
            return super().evaluate(*args, **kwargs)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """A block in which the model has the averaged weights, where there is an average."""
        return nullcontext() if self.average is None else self.average.applied(cast(Any, self.model))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss terms: means over the steps since the last log, over all ranks."""
        if "loss" in logs:
            logs.update(self._pop_loss_terms(training=True, prefix=""))
        elif "eval_loss" in logs:
            logs.update(self._pop_loss_terms(training=False, prefix="eval_"))
            logs.update({f"eval_{name}": value for name, value in self._generation_scores.items()})
        super().log(logs, start_time)

    def _pop_loss_terms(self, *, training: bool, prefix: str) -> dict[str, float]:
        sums = self._sums[training]
        self._sums[training] = torch.zeros(0)
        if not len(sums):
            return {}
        if self.args.world_size > 1:
            sums = sums.clone()
            dist.all_reduce(sums)
        if training:
            count = self.state.global_step - self._logged_step
            self._logged_step = self.state.global_step
        else:
            count = len(self.get_eval_dataloader())
        values = sums.tolist()
        metrics = {prefix + name: value / max(count, 1) for name, value in zip(self._terms, values)}
        metrics[prefix + "token_accuracy"] = values[-2] / max(values[-1], 1.0)
        return metrics

    @property
    def _run(self) -> Path:
        return Path(str(self.args.output_dir))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = self._run / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            begin(folder)
        self.wait_for_ranks()
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
        self.trainer._logged_step = state.global_step
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

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.average is not None:
            self.trainer.average.update(cast(Any, self.trainer.model))

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
