"""Two ranks write checkpoints and resume others: ``resharding_ranks.py OUTPUT``; OUTPUT/single is of one process.

Every run writes its figures to OUTPUT/result.json, by its name: the kind of sharding that wrote the checkpoint, and the
one that it is resumed under.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from forked_ranks import start
from safetensors.torch import save_file
from toy import make_toy, make_trainer
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ntpseg.training.distributed import deepspeed_config, end_processes, prepare_deepspeed, rank
from ntpseg.training.ema import WeightAverage

NAMES = ("loss", "ntp", "nktp", "tcl", "het", "grad_norm", "token_accuracy", "learning_rate")
FIELDS = {"num_train_epochs": 3, "weight_decay": 0.1, "lr_scheduler_type": "cosine"}
STEP = 3  # in the middle of the second epoch, when each rank has recorded other hard tokens


class Stop(TrainerCallback):
    def on_save(self, args, state, control, **kwargs) -> None:
        raise InterruptedError


def use_fsdp(trainer: Any) -> None:
    """FSDP2 on CPUs, for which accelerate takes DDP without a word."""
    state = trainer.accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[type(trainer.model.backbone.layers[0]).__name__],
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    trainer.is_fsdp_enabled = True


def make(output: Path, kind: str, batch: int, accumulation: int, **fields: Any) -> Any:
    """A trainer of the toy; with an average of the weights where each rank has all of them."""
    if kind.startswith("zero"):
        zero = deepspeed_config(kind)
        if kind == "zero3":
            zero["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        fields["deepspeed"] = zero
    trainer = make_trainer(
        make_toy(14, variants=1),
        output,
        k=3,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **FIELDS,
        **fields,
    )
    if kind == "fsdp":
        use_fsdp(trainer)
    elif kind != "zero3":
        trainer.average = WeightAverage(trainer.model, 0.9)
    return trainer


def write(output: Path, kind: str, batch: int, accumulation: int) -> None:
    """Train to the checkpoint of step `STEP`, and no further."""
    trainer = make(output, kind, batch, accumulation, save_strategy="steps", save_steps=STEP, callbacks=[Stop()])
    try:
        trainer.train()
    except InterruptedError:
        return
    raise AssertionError("no checkpoint was written")


def resume(checkpoint: Path, output: Path, kind: str, batch: int, accumulation: int, average: bool = True) -> list[Any]:
    """Resume, and train to the end; every step's figures."""
    trainer = make(output, kind, batch, accumulation)
    if not average:
        trainer.average = None
    trainer.train(str(checkpoint))
    if trainer.average is not None and rank() == 0:
        save_file(dict(zip(trainer.average.names, trainer.average.weights)), output.with_suffix(".safetensors"))
    return [[line[n] for n in NAMES] for line in trainer.state.log_history if "loss" in line]


def forget() -> None:
    """Let the next trainer of this process set itself up anew."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    if dist.is_initialized():
        dist.barrier()


# What wrote the checkpoint, and what resumes it on two ranks.
PAIRS = (("single", "zero2"), ("single", "ddp"), ("single", "fsdp"), ("zero2", "zero3"), ("zero3", "zero1"))


def main(output: Path) -> None:
    torch.set_num_threads(1)
    prepare_deepspeed()
    result = {}
    for kind in ("ddp", "zero2", "zero3", "fsdp"):
        write(output / kind, kind, 2, 2)
        forget()
    for saved, kind in PAIRS:
        name, average = f"{saved}-{kind}", saved in ("single", "ddp", "zero2")
        checkpoint = output / saved / f"checkpoint-{STEP}"
        result[name] = resume(checkpoint, output / name, kind, 2, 2, average=average)
        forget()
    if rank() == 0:
        (output / "result.json").write_text(json.dumps(result))
    end_processes()


if __name__ == "__main__":
    import deepspeed  # noqa: F401  # so that the ranks, which are forked, need not each do it

    start(main, Path(sys.argv[1]))
