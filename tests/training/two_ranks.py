"""Trains the toy on two ranks: ``two_ranks.py OUTPUT MODE ...``.

Each MODE is ddp, zero2 or zero3, with ``+`` on packed rows and with activation checkpointing; a zero3 run is also
resumed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from forked_ranks import start
from toy import make_toy, make_trainer, sequence_of

from ntpseg.training import Collator, dataset
from ntpseg.training.argument_rules import installed_names
from ntpseg.training.distributed import deepspeed_config, end_processes, prepare_deepspeed, rank

NAMES = ("loss", "ntp", "nktp", "tcl", "het", "grad_norm", "token_accuracy")


def run(mode: str, output: Path, batch: int, **fields) -> list[list[float]]:
    """Every step's figures of three epochs; with ``save_strategy`` also checkpoints and the saved model."""
    packed, mode = mode.endswith("+"), mode.removesuffix("+")
    zero = deepspeed_config(mode if mode.startswith("zero") else None)
    if zero is not None:
        if mode == "zero3":
            zero["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        fields["deepspeed"] = zero
    fields = {"num_train_epochs": 3, "per_device_train_batch_size": batch, **fields}
    resume = fields.pop("resume", None)
    toy = make_toy(16, variants=1)
    trainer = make_trainer(toy, output, k=3, **fields, **installed_names({"activation_checkpointing": packed}))
    if packed:
        dataset._WORTH_PACKING = 10.0  # also where it saves nothing, as the toy's sentences are about as long
        collate = Collator(sequence_of(toy), packing=400)

        def packed_batch(samples):
            batch = collate(samples)
            assert "packing" in batch
            return batch

        trainer.data_collator = packed_batch
    trainer.train(resume)
    if "save_strategy" in fields:
        trainer.save_model(str(output / "model"))
    logs = [line for line in trainer.state.log_history if "loss" in line]
    # Sent beside the steps, and not at the end of an epoch alone.
    assert dist.get_world_size() == 1 or sum(line["het_sent_mb"] > 0 for line in logs) > 3
    return [[line[n] for n in NAMES] for line in logs]


def forget() -> None:
    """Let the next trainer of this process set itself up anew."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    dist.barrier()


def main(output: Path, modes: list[str]) -> None:
    torch.set_num_threads(1)
    prepare_deepspeed()
    result = {}
    for mode in modes:
        fields = {"save_strategy": "steps", "save_steps": 3} if mode == "zero3" else {}
        result[mode] = run(mode, output / mode, 2, gradient_accumulation_steps=2, **fields)
        forget()
    if "zero3" in modes:
        checkpoint = str(output / "zero3" / "checkpoint-3")
        result["resumed"] = run("zero3", output / "again", 2, gradient_accumulation_steps=2, resume=checkpoint)
    if rank() == 0:
        (output / "result.json").write_text(json.dumps(result))
    end_processes()


if __name__ == "__main__":
    import deepspeed  # noqa: F401  # so that the ranks, which are forked, need not each do it

    start(main, Path(sys.argv[1]), sys.argv[2:])
