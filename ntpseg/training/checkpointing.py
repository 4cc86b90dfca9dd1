"""`CheckpointTrainer`: what a checkpoint holds besides the Trainer's files, and how training goes on from one."""

from __future__ import annotations

import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from transformers import set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from ntpseg.training import resharding
from ntpseg.training.budget import TimeBudget
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
from ntpseg.training.divergence import check_weights
from ntpseg.training.ema import WeightAverage, average_files
from ntpseg.training.parallelism import Parallelism
from ntpseg.training.pickles import weights_only
from ntpseg.training.resumed_settings import OptimizerSettings
from ntpseg.training.sharded_weights import gather_fsdp2
from ntpseg.training.steps import StepTrainer

# More than there are ranks: those that join at one step draw otherwise than those that joined at another.
_SEEDS_APART = 1_000_003


class CheckpointTrainer(StepTrainer):
    """The part of `NTPSegTrainer` that saves and resumes, the average of the weights included.

    What the files are and when a checkpoint counts as whole says `ntpseg.training.checkpoint`; how one is converted
    to another number of ranks, `ntpseg.training.resharding`.

    Args:
        optimizer_options: its `ema` is the decay of the average of the weights, see `WeightAverage`; 0: none is kept.
        budget: whose spent time is saved; None: there is none.
        **kwargs: see `StepTrainer`.
    """

    def __init__(
        self,
        *args: Any,
        optimizer_options: OptimizerConfig | None = None,
        budget: TimeBudget | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.budget = budget
        self.optimizer_options = optimizer_options or OptimizerConfig()
        self.average: WeightAverage | None = None
        self._average_from: Path | None = None
        self._saved: Parallelism | None = None
        self._resharding: resharding.Resharding | None = None
        self._settings: OptimizerSettings | None = None
        self._evaluation_due = False

    @property
    def shares_weights(self) -> bool:
        """Whether each rank holds only a part of the weights (ZeRO-3, FSDP)."""
        return bool(self.is_fsdp_enabled or is_deepspeed_zero3_enabled())

    @property
    def _run(self) -> Path:
        return Path(str(self.args.output_dir))

    # ---- average of the weights

    def start_average(self) -> None:
        """Average the weights from now on, or on from the checkpoint of a resumed run, where that is asked for.

        The beginning of training calls it: before, DeepSpeed may yet have to divide the weights, or to move them.
        """
        if self.average is None and self.optimizer_options.ema:
            self.average = WeightAverage(cast(Any, self.model), self.optimizer_options.ema)
        if self.average is not None and self._average_from is not None:
            self.average.load(self._average_from)

    def averaged_weights(self) -> AbstractContextManager[None]:
        """A block in which the model has the averaged weights, where there is an average."""
        return nullcontext() if self.average is None else self.average.applied(cast(Any, self.model))

    # ---- saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's.

        Raises:
            TrainingDiverged: the weights are not finite; nothing is written.
        """
        if not _internal_call:
            check_weights(cast(Any, self.model), "the model", world_size=self.args.world_size)
        if self.is_fsdp_enabled and not _internal_call:
            # The Trainer writes nothing where checkpoints are saved in shards.
            self._save(output_dir, state_dict=gather_fsdp2(cast(Any, self.model)))
        else:
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # The weights may be what makes steps fail: older checkpoints must not make room for them, but for those that an
        # evaluation found to be the best. Where the run ends with this step, there is no later one to save.
        ends = self._asked is not None or self.control.should_training_stop
        if self.skipped_in_row and not ends and self.state.best_global_step != self.state.global_step:
            self._save_due = True
            return
        with self.throughput.pause():
            self._write_checkpoint(model, trial)

    def _write_checkpoint(self, model: Any, trial: Any) -> None:
        folder = self._run / f"checkpoint-{self.state.global_step}"
        check_weights(cast(Any, self.model), folder.name, world_size=self.args.world_size)
        if self.args.should_save:
            begin(folder)
        self.wait_for_ranks()
        if self.args.should_save:
            Parallelism.of(self).save(folder)
        if self.budget is not None and self.is_world_process_zero():
            self.budget.save(folder)
        self._means.save(folder, write=self.is_world_process_zero())
        if self.memory is not None:
            save_memory(self.memory, folder, self.args.process_index)
        if self.average is not None and (self.is_world_process_zero() or not self.average.is_whole):
            self.average.save(folder, self.args.process_index)
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

    def _restore(self, resume_from_checkpoint: Any) -> Path | None:
        """Take from a checkpoint what the Trainer does not; the checkpoint's path, None where training starts anew."""
        self._saved, self._resharding, self._average_from, self._save_due = None, None, None, False
        if not resume_from_checkpoint:
            if self.budget is not None:
                self.budget.load(None)
            return None
        checkpoint = last_checkpoint(self._run) if resume_from_checkpoint is True else Path(resume_from_checkpoint)
        if checkpoint is None:
            raise ValueError(f"resume must find a checkpoint in {self._run}, got none")
        check_resumable(checkpoint, self.args.process_index)
        if self.budget is not None:
            self.budget.load(checkpoint)
        if self.optimizer_options.ema:
            average_files(checkpoint)
        self._saved, now = Parallelism.read(checkpoint), Parallelism.of(self)
        if resharding.needed(self._saved, now):
            with weights_only():
                self._resharding = resharding.Resharding(self, checkpoint, self._saved, now)
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
        self._average_from = checkpoint
        return checkpoint

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """The Trainer warns of weights that a checkpoint lacks, and goes on with those that the model has."""
        model: Any = self.model
        missing = sorted(set(load_result.missing_keys) - set(model._tied_weights_keys or ()))
        for name, reason in [(n, "without") for n in missing] + [(n, "with") for n in load_result.unexpected_keys]:
            raise ValueError(f"checkpoint must hold the weights of this model, got one {reason} {name!r}")

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; what this run sets of it is remembered, since a checkpoint's state replaces that."""
        made: Any = super().create_optimizer(*args, **kwargs)
        # Where DeepSpeed's own JSON file names the optimizer, only a placeholder is here.
        self._settings = OptimizerSettings(made) if hasattr(made, "param_groups") else None
        return made

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._resharding is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    @property
    def _is_spent(self) -> bool:
        return self.budget is not None and self.budget.is_spent

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        known = None if self._resharding is not None else resume_from_checkpoint
        prepared = super()._prepare_for_training(max_steps, train_dataloader, known)
        if self._resharding is not None:
            self._resharding.load()
        if resume_from_checkpoint:
            self._keep_settings(max_steps)
        return prepared

    def _keep_settings(self, max_steps: int) -> None:
        """What this run sets holds, not what the one of the checkpoint had set."""
        self.state.compute_steps(self.args, max_steps)
        changed = [] if self._settings is None else self._settings.restore(self.optimizer, self.lr_scheduler)
        if changed and self.is_world_process_zero():
            print(f"resumed with other settings: {', '.join(changed)}", file=sys.stderr)

    def _load_best_model(self) -> None:
        best, now = Path(str(self.state.best_model_checkpoint)), Parallelism.of(self)
        saved = Parallelism.read(best) if best.is_dir() else now
        # The best checkpoint may be older than the change of ranks.
        if resharding.needed(saved, now) and (now.sharded or saved.kind == "fsdp"):
            resharding.Resharding(self, best, saved, now).load()
        else:
            super()._load_best_model()

    def _load_rng_state(self, checkpoint: Any) -> None:
        saved, now = self._saved, Parallelism.of(self)
        if saved is None or (saved.ranks, saved.data_parallel_size) == (now.ranks, now.data_parallel_size):
            super()._load_rng_state(checkpoint)
        else:
            with tempfile.TemporaryDirectory() as folder:
                resharding.write_random_state(Path(checkpoint), saved, self.args.process_index, now, Path(folder))
                super()._load_rng_state(folder)
            if self.data_parallel_rank >= saved.data_parallel_size:
                self._seed_apart(self.state.global_step)
        # Here the state is that of the unbroken run before the evaluation.
        if self._evaluation_due:
            self._make_up_evaluation()

    @property
    def data_parallel_rank(self) -> int:
        """Which part of each batch this rank reads; ranks that share sequences read one."""
        return self.args.process_index // self.sequence_parallel_size

    def seed_ranks(self) -> None:
        """Let no two ranks with batches of their own draw alike in a new run: dropout, and replaced mask inputs."""
        if self.data_parallel_rank:
            self._seed_apart(0)

    def _seed_apart(self, step: int) -> None:
        set_seed((self.args.seed + self.data_parallel_rank + _SEEDS_APART * step) % 2**32)

    def _make_up_evaluation(self) -> None:
        self._evaluation_due = False
        metrics = self._evaluate(None, None)
        folder = self._run / f"checkpoint-{self.state.global_step}"
        if self._determine_best_metric(metrics, None) and folder.is_dir():
            self.state.best_model_checkpoint = str(folder)
