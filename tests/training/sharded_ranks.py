"""Trains and builds models in shards on two ranks: ``sharded_ranks.py OUTPUT MODE ...``.

Each MODE is ddp, fsdp2, zero3 or a configuration that offloads; with ``+`` with activation checkpointing (with ``*``
FSDP's own), with ``/`` with both ranks on each sequence, with ``~`` with bfloat16 products. ``memory fsdp2`` and
``memory zero3`` measure a larger model's construction.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist
from forked_ranks import start
from toy import SMALL, make_toy, make_trainer, sequence_of
from transformers import TrainingArguments

from ntpseg.models import NTPSegModel, heads, preset_config
from ntpseg.models.sharded_init import build_sharded, load_sharded
from ntpseg.training.argument_rules import installed_names
from ntpseg.training.config import OptimizerConfig
from ntpseg.training.distributed import deepspeed_config, end_processes, prepare_deepspeed, rank
from ntpseg.training.parallelism import Parallelism
from ntpseg.training.sharded_weights import partition_zero3, shards_of_run, without_zero_init

SAVED = ("fsdp2", "zero3")
NAMES = ("loss", "ntp", "nktp", "tcl", "het", "grad_norm")
# Plain gradient descent: Adam would divide by gradients that are nearly zero, and magnify rounding.
FIELDS: dict[str, Any] = {
    "k": 3,
    "num_train_epochs": 2,
    "optim": "sgd",
    "learning_rate": 0.05,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "evaluate": True,
    "trainer_options": {"optimizer_options": OptimizerConfig(ema=0.9)},
}


def figures(trainer) -> list[list[float]]:
    """Of every training step and evaluation."""
    found = []
    for line in trainer.state.log_history:
        if "loss" in line or "eval_loss" in line:
            prefix = "eval_" if "eval_loss" in line else ""
            found.append([line.get(prefix + name, 0.0) for name in NAMES])
    return found


def construct(config, args):
    shards = shards_of_run(args)
    assert shards is not None
    torch.manual_seed(0)
    with without_zero_init():
        model = build_sharded(lambda: NTPSegModel(config), shards)
    if shards.flat:
        partition_zero3(model)
    return model


def arguments(mode: str) -> dict[str, Any]:
    if mode == "ddp":
        return {}
    if mode == "fsdp2":
        return {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
    zero = deepspeed_config(mode)
    # Small weights stay whole otherwise, which a toy's all are; what stays is averaged too.
    if "zero3" in mode:
        zero["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    return {"deepspeed": zero}


@contextmanager
def watched(model) -> Iterator[list[list[int]]]:
    """The tokens of a sequence, how many of them the decoder reads, and the classes of the loss, of every forward."""
    seen: list[list[int]] = []
    real = heads.ntp_loss

    def loss(hidden, weight, *args, **kwargs):
        seen[-1].append(weight.shape[0])
        return real(hidden, weight, *args, **kwargs)

    def embedded(module, arguments, output):
        seen.append([output.shape[1]])

    def decoded(module, arguments, output):
        seen[-1].append(output.shape[1] if isinstance(output, torch.Tensor) else output[0].shape[1])

    hooks = [model.get_input_embeddings().register_forward_hook(embedded)]
    hooks.append(model.backbone.norm.register_forward_hook(decoded))
    heads.ntp_loss = loss
    try:
        yield seen
    finally:
        heads.ntp_loss = real
        for hook in hooks:
            hook.remove()


def train(mode: str, output: Path, resume: str | None = None) -> tuple[list[list[float]], int]:
    checkpointing, shared = "+" in mode, "/" in mode
    own, mixed, mode = "*" in mode, "~" in mode, mode.rstrip("+/*~")
    fields = FIELDS | arguments(mode) | installed_names({"activation_checkpointing": checkpointing})
    # Of the eight samples of a step each rank reads four, or with shared sequences all.
    steps = 2 if mode == "fsdp2" else 1
    batch = {"per_device_train_batch_size": (8 if shared else 4) // steps, "gradient_accumulation_steps": steps}
    fields |= {**batch, "per_device_eval_batch_size": 4}
    if mixed:
        fields["bf16"] = True
    if own:
        fields["fsdp_config"] = {**fields["fsdp_config"], "activation_checkpointing": True}
    saves = mode in SAVED and not (checkpointing or shared or own or mixed)
    if saves:
        fields |= {"save_strategy": "steps", "save_steps": 3}
    if shared:
        fields["trainer_options"] = {**FIELDS["trainer_options"], "sequence_parallel_size": 2}
    made = construct if mode == "fsdp2" or "zero3" in mode else None
    trainer = make_trainer(make_toy(16, variants=1), output, construct=made, **fields)
    assert Parallelism.of(trainer).pairs == trainer.get_total_train_batch_size(trainer.args) == 8
    with watched(trainer.model) as seen:
        trainer.train(resume)
    if shared:
        length, positions, classes = seen[0]
        assert positions == -(-length // 2) and classes == -(-trainer.model.config.vocab_size // 2), seen[0]
        assert any(length % 2 for length, _, _ in seen), "no sequence had to be filled up"
    if saves:
        with trainer.averaged_weights():
            trainer.save_model(str(output / "model"))
    return figures(trainer), sum(weight.numel() for weight in trainer.average.weights)


def measure(mode: str, output: Path) -> dict[str, Any]:
    """MiB that each rank's memory grows by at most while it builds a model, drawn or read in shards, or whole."""
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4, "head_dim": 128}
    args = TrainingArguments(output_dir=str(output), report_to="none", use_cpu=True, **arguments(mode))

    def configuration(sizes):
        return preset_config("tiny", sequence_of(make_toy(4)), overrides=sizes, num_heads_k=2)

    def build(way: str, config, folder: Path):
        torch.manual_seed(0)
        if way == "whole":
            return NTPSegModel(config)
        shards = shards_of_run(args)
        assert shards is not None
        with without_zero_init():
            if way == "drawn":
                model = build_sharded(lambda: NTPSegModel(config), shards)
            else:
                model = load_sharded(lambda: NTPSegModel(config), shards, folder)
        if shards.flat:
            partition_zero3(model)
            return model
        return make_trainer(make_toy(4), output, construct=lambda *_: model, **arguments(mode))

    def peak(way: str, config, folder: Path) -> float:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        before = status("VmRSS")
        with nullcontext() if way != "whole" else without_zero_init():
            built = build(way, config, folder)
        del built
        return (status("VmHWM") - before) / 1024

    peaks: dict[str, float] = {}
    for name, config in {"small": configuration(SMALL), "large": configuration(sizes)}.items():
        folder = output / f"{mode}-{name}"
        if rank() == 0:
            with without_zero_init():
                NTPSegModel(config).save_pretrained(folder, max_shard_size="50MB")
        dist.barrier()
        # The small one has everything imported.
        peaks = {way: peak(way, config, folder) for way in ("drawn", "read", "whole")}
    with torch.device("meta"), without_zero_init():
        weights = [weight.numel() * 4 / 2**20 for weight in NTPSegModel(configuration(sizes)).parameters()]
    found: list[Any] = [None, None]
    dist.all_gather_object(found, peaks)
    return {"peaks": found, "model": sum(weights), "largest": max(weights)}


def status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def forget() -> None:
    """Let the next trainer of this process set itself up anew."""
    from accelerate.state import AcceleratorState, GradientState

    os.environ.pop("ACCELERATE_USE_FSDP", None)
    AcceleratorState._reset_state()
    GradientState._reset_state()
    dist.barrier()


def main(output: Path, modes: list[str]) -> None:
    torch.set_num_threads(1)
    if any("zero3" in mode for mode in modes):
        prepare_deepspeed()
    else:
        dist.init_process_group("gloo")
    result: dict[str, Any] = {}
    for mode in modes:
        if mode.startswith("memory"):
            result[mode] = measure(mode.split()[1], output)
            forget()
            continue
        result[mode], held = train(mode, output / mode.replace("/", "-"))
        forget()
        counts: list[Any] = [None, None]
        dist.all_gather_object(counts, held)
        result[f"{mode} held"] = counts
        if mode in SAVED:
            checkpoint = str(output / mode / "checkpoint-3")
            result[f"{mode} resumed"] = train(mode, output / f"{mode}-again", checkpoint)[0][3:]
            forget()
    if rank() == 0:
        (output / "result.json").write_text(json.dumps(result))
    end_processes()


if __name__ == "__main__":
    if any("zero3" in mode for mode in sys.argv[2:]):
        import deepspeed  # noqa: F401  # so that the ranks, which are forked, need not each do it
    start(main, Path(sys.argv[1]), sys.argv[2:])
