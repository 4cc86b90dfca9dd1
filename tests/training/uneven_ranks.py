"""Trains on numbers of samples that no batch divides, on two ranks: ``uneven_ranks.py OUTPUT MODE ...``, or alone.

Each MODE is ddp, dense (with losses on pixels), nan, zero2 or zero3; in the last three one sample has a NaN for its
loss. The global batch is four samples, twice accumulated, however many processes there are.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from forked_ranks import start
from toy import make_toy, make_trainer

from ntpseg.training.distributed import deepspeed_config, end_processes, prepare_deepspeed, rank

SIZES = {"ddp": (14, 9, 1), "dense": (7,), "nan": (14,), "zero2": (14,), "zero3": (14,)}
BROKEN = 5
# Figures of a log that differ from run to run, or with the division of a batch.
MACHINE = ("total_flos", "mfu", "peak_memory_gib", "data_wait_share", "padding_share")
# Plain gradient descent: Adam would divide by gradients that are nearly zero, and magnify rounding.
PLAIN = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 1e9}


def run(mode: str, pairs: int, output: Path) -> dict[str, Any]:
    """Every log line, the weights and the hard tokens at the end."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    fields: dict[str, Any] = {}
    if mode.startswith("zero"):
        fields["deepspeed"] = deepspeed_config(mode)
        if mode == "zero3":
            fields["deepspeed"]["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    options: dict[str, Any] = {}
    if mode == "dense":
        options = {"dense_loss": {"dice": 0.5, "pixel": 0.0, "soft": 0.25}, "patch_size": 4}
    toy = make_toy(pairs, variants=1)
    for row, texts in enumerate(toy.texts):
        toy.texts[row] = [text + "!" * row for text in texts]
    trainer = make_trainer(
        toy,
        output,
        k=3,
        model_options=options,
        evaluate=True,
        eval_strategy="epoch",
        num_train_epochs=3,
        per_device_train_batch_size=4 // world,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=2,
        **PLAIN,
        **fields,
    )
    if mode == "dense":
        trainer.model.readout.set_patches(torch.from_numpy(toy.patches).float().view(-1, 4, 4))
    if mode not in ("ddp", "dense"):
        break_sample(trainer.model)
    trainer.train()
    trainer.save_model(str(output / "model"))
    log = [
        {k: v for k, v in line.items() if "second" not in k and "runtime" not in k and k not in MACHINE} | work(line)
        for line in trainer.state.log_history
    ]
    return {"log": log, "memory": trainer.memory.state_dict()}


def work(line: dict[str, Any]) -> dict[str, float]:
    """What a step did by a training log's figures, whatever time it took."""
    names = ("tokens_per_second", "supervised_tokens_per_second", "flops_per_second")
    return {name.removesuffix("_per_second"): line[name] * line["step_seconds"] for name in names if name in line}


def break_sample(model: Any) -> None:
    """Give sample `BROKEN`, known by its caption's marks, a loss of NaN."""
    forward = model.forward

    def broken(*args: Any, **inputs: Any) -> Any:
        output = forward(*args, **inputs)
        marks = (inputs["input_ids"] == ord("!")).sum(1)
        odd = (marks == BROKEN) & (inputs["labels"] != -100).any(1)
        if model.training and bool(odd.any()):
            output.loss = output.loss * torch.nan
            output.nll = output.nll.masked_fill(odd[:, None], torch.nan)
        return output

    model.forward = broken


def alone(output: Path, modes: list[str]) -> dict[Any, Any]:
    """What one process does in each mode; one run stands for nan, zero2 and zero3, since DeepSpeed changes nothing."""
    result: dict[Any, Any] = {}
    for mode in modes:
        for pairs in SIZES[mode]:
            same = "nan" if mode.startswith("zero") else mode
            if (same, pairs) not in result:
                result[same, pairs] = run(same, pairs, output / f"{same}-{pairs}")
            result[mode, pairs] = result[same, pairs]
    return result


def main(output: Path, modes: list[str]) -> None:
    torch.set_num_threads(1)
    if any(mode.startswith("zero") for mode in modes):
        prepare_deepspeed()
    else:
        dist.init_process_group("gloo")
    result = {}
    for mode in modes:
        for pairs in SIZES[mode]:
            result[mode, pairs] = run(mode, pairs, output / f"{mode}-{pairs}")
            AcceleratorState._reset_state()
            GradientState._reset_state()
            dist.barrier()
    if rank() == 0:
        torch.save(result, output / "result.pt")
    end_processes()


if __name__ == "__main__":
    if any(mode.startswith("zero") for mode in sys.argv[2:]):
        import deepspeed  # noqa: F401  # so that the ranks, which are forked, need not each do it
    start(main, Path(sys.argv[1]), sys.argv[2:])
