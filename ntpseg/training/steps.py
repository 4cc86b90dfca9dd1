"""`StepTrainer`: steps and evaluations that are the same however they are cut, and steps that must not be taken."""

from __future__ import annotations

import math
import signal
import sys
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import Trainer

from ntpseg.losses import NumItems, count_items
from ntpseg.memory import HardTokenMemory, HardTokens
from ntpseg.training.checkpoint import last_checkpoint
from ntpseg.training.dataset import EpochDataset, EpochSampler, ignore_padding
from ntpseg.training.divergence import CURE, MicroBatch, TrainingDiverged, judge_step
from ntpseg.training.hard_tokens import HardTokenExchange
from ntpseg.training.interruption import Interruption
from ntpseg.training.loss_means import EvaluationMeans, LossMeans
from ntpseg.training.parallelism import data_parallel_size
from ntpseg.training.throughput import Throughput, count_batch
from ntpseg.utils.ranges import part

LOSS_TERMS = ("ntp", "nktp", "tcl", "het")
# Only of models that have losses on pixels.
DENSE_TERMS = ("dice", "pixel", "soft")
# A loss scaler halves its scale of 65,536 at each; after so many it is below 1e-7.
MAX_OVERFLOWS = 40


class StepTrainer(Trainer):
    """The part of `NTPSegTrainer` that says what a step and an evaluation count, and whether a step counts at all.

    Args:
        memory: where hard error tokens are kept; None switches HET off.
        hard_token_sync_steps: ranks exchange them every so many steps, in the background; 0: once an epoch alone.
        max_skipped_steps: so many skipped steps in a row end training.
        sequence_parallel_size: so many consecutive ranks read the same batches and share their sequences, see
            `NTPSegModel.share_sequences`.
        **kwargs: see `transformers.Trainer`.

    Raises:
        ValueError: the ranks, or the model's attention heads, cannot be divided into such groups.
    """

    train_dataset: EpochDataset

    def __init__(
        self,
        *args: Any,
        memory: HardTokenMemory | None = None,
        max_skipped_steps: int = 5,
        hard_token_sync_steps: int = 0,
        sequence_parallel_size: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.sequence_parallel_size = sequence_parallel_size
        self.data_parallel_size = data_parallel_size(self.args.world_size, sequence_parallel_size)
        if sequence_parallel_size > 1:
            cast(Any, self.model).share_sequences(dist.new_subgroups(sequence_parallel_size)[0])
        # With the filter the Trainer logs a loss of 0 in place of NaN.
        self.args.logging_nan_inf_filter = False
        config = cast(Any, self.model).config
        dense = getattr(config, "dense_loss", None) or {}
        used = tuple(name for name in DENSE_TERMS if dense.get(name))
        self._terms = LOSS_TERMS + used
        self.memory = memory
        self._exchange = HardTokenExchange(memory, hard_token_sync_steps, self.args.world_size)
        weights = {"nktp": 1.0, "tcl": config.tcl_weight, "het": config.het_weight, **{n: dense[n] for n in used}}
        self._means = LossMeans(self._terms, self.args.world_size)
        self._evaluation_means = EvaluationMeans(weights, used, self.args.world_size)
        self.throughput = Throughput(config.num_heads_k, self.args.device, self.args.world_size)
        self._evaluating = False
        self.max_skipped_steps, self.skipped_in_row = max_skipped_steps, 0
        self._step: list[MicroBatch] = []
        self._step_sums = torch.zeros(0)
        self._supervised = torch.zeros(())
        self._gradient_norm: Tensor | float | None = None
        self._steps_counted, self._moved, self._may_move = 0, False, False
        self._overflows = 0
        self._skip_reason: str | None = None
        self._interruption = Interruption()
        self._asked: str | None = None
        self._save_due = False

    # ---- data

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, EpochDataset):
            return super()._get_train_sampler(dataset)
        return self._sampler(dataset, self._train_batch_size)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if not isinstance(eval_dataset, EpochDataset):
            return super()._get_eval_sampler(eval_dataset)
        return self._sampler(eval_dataset, self.args.eval_batch_size, shuffle=False)

    def _sampler(self, dataset: EpochDataset, batch_size: int, *, shuffle: bool = True) -> EpochSampler:
        copies = self.sequence_parallel_size
        multiple = self._samples_of_ranks(batch_size)
        return EpochSampler(dataset, multiple, shuffle=shuffle, copies=copies, batch_size=batch_size)

    def _samples_of_ranks(self, batch_size: int) -> int:
        """Of what the samples must be a multiple, so that none is repeated to give each rank as many batches."""
        if self.args.world_size == 1 or self.args.dataloader_drop_last:
            return 1
        return batch_size if self.accelerator.split_batches else batch_size * self.data_parallel_size

    def get_total_train_batch_size(self, args: Any) -> int:
        """The global batch, of which the Trainer knows none of our shared sequences."""
        return int(super().get_total_train_batch_size(args)) // self.sequence_parallel_size

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a training step and their counts; the Trainer calls it for training alone."""
        self._step, self._step_sums, self._gradient_norm = [], torch.zeros(0), None
        return super().get_batch_samples(self.throughput.batches(epoch_iterator), num_batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """The counts of all micro-batches of a step over all ranks; adds each micro-batch's hard tokens on the way.

        Whose step it is decides, not the mode of the model: that is still evaluation's in the step after one.
        """
        if not batch_samples or self._evaluating:
            return None
        model: Any = self.model
        config, heads = model.config, model.config.num_heads_k
        # Counted together, so that ranks exchange one vector: rows, tokens and lengths, hard tokens, labelled images.
        counts = torch.zeros(heads + 6, dtype=torch.float64, device=device)
        for batch in batch_samples:
            counts[heads:-2] += count_batch(batch, self._pad, device)
            ignore_padding(batch)
            het = None
            if self.memory is not None:
                with part("HET recording"):
                    het = self.memory.lookup(batch["sample_ids"])
                batch["het_position"], batch["het_token"] = het.position, het.token
                het = HardTokens(het.position.to(device), het.token.to(device))
            rows, entries, images = self._count(batch["labels"].to(device), het)
            counts[:heads] += rows
            counts[-2] += entries
            counts[-1] += images
        if self.args.world_size > 1:
            dist.all_reduce(counts)
        if config.dense_loss is not None:
            for batch in batch_samples:
                batch["num_images"] = counts[-1].to(torch.float32)
        # Ranks that share sequences have counted the same ones.
        self.throughput.add(counts[:-2] / self.sequence_parallel_size)
        self._supervised = counts[:heads].sum()
        return NumItems(counts[:heads], counts[-2])

    @property
    def _pad(self) -> int:
        pad = cast(Any, self.model).config.text_config.pad_token_id
        return -1 if pad is None else int(pad)

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

    def _clip_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        with part("optimiser"):
            return super()._clip_grad_norm(*args, **kwargs)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm: Any = super()._get_grad_norm(*args, **kwargs)
        # Under FSDP2 each rank has a part of the sum.
        self._gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return self._gradient_norm

    def _settle_step(self) -> None:
        """Count the step whose gradient is ready, or have it skipped."""
        norm = self._gradient_norm
        if norm is None and not self._optimizer_skips:
            # The Trainer computes none where it clips none.
            grads = [p.grad for p in cast(Any, self.model).parameters() if p.grad is not None]
            total: Any = torch.nn.utils.get_total_norm(grads)
            norm = total.full_tensor() if isinstance(total, DTensor) else total
        if self.args.fp16:
            # A loss scaler expects gradients that overflow and finds its scale by them.
            norm = None
        reason, asked = judge_step(
            self._step,
            self._means.names,
            norm,
            self._supervised,
            world_size=self.args.world_size,
            signal=int(self._interruption.signal or 0),
        )
        self._skip_reason = reason
        if asked:
            self._asked = signal.Signals(asked).name
        if reason is None:
            self.skipped_in_row = 0
            self._steps_counted += 1
            self._may_move = any(group["lr"] > 0 for group in cast(Any, self.optimizer).param_groups)
            self._means.steps += 1
            self._means.add(self._step_sums)
            if self.memory is not None:
                for batch in self._step:
                    with part("HET recording"):
                        self.memory.record(batch.sample_ids, batch.prediction, batch.labels, batch.margin)
        else:
            self.skipped_in_row += 1
            if not self._optimizer_skips:
                # Without gradients optimizers leave weights and their own state alone, decay included.
                cast(Any, self.model).zero_grad(set_to_none=True)
        self._step = []

    def _count_overflow(self, skipped: bool) -> None:
        """Note whether a loss scaler took the step that was settled.

        Raises:
            TrainingDiverged: it has found no scale for `MAX_OVERFLOWS` steps: no scale is small enough.
        """
        self._overflows = self._overflows + 1 if skipped else 0
        self._moved |= self._may_move and not skipped
        if self._overflows >= MAX_OVERFLOWS:
            last = last_checkpoint(Path(str(self.args.output_dir)))
            raise TrainingDiverged(
                f"training stopped after {self._overflows} steps in a row, the last of them step "
                f"{self.state.global_step}, whose gradient is not finite in float16 at any scale; {CURE}, or use "
                f"training.bf16; last checkpoint: {'none' if last is None else last.name}"
            )

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
