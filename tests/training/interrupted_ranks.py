"""Two ranks train the toy, the last one alone gets SIGTERM, and two others go on: ``interrupted_ranks.py OUTPUT``.

Once under DDP and once under ZeRO-2. Every rank writes what it saw to OUTPUT/MODE-asked-N.json, and when it has gone on
to OUTPUT/MODE-resumed-N.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from forked_ranks import start
from toy import losses, make_toy, make_trainer
from transformers import TrainerCallback

from ntpseg.training.checkpoint import last_checkpoint
from ntpseg.training.distributed import deepspeed_config, end_processes, prepare_deepspeed, rank
from ntpseg.training.interruption import TrainingInterrupted


class Term(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if rank() == 1 and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def main(output: Path, mode: str, step: int) -> None:
    """Train to the signal in a step, or with step 0 from its checkpoint to the end."""
    torch.set_num_threads(1)
    prepare_deepspeed()
    fields = {"deepspeed": deepspeed_config(mode)} if mode != "ddp" else {}
    fields |= {"num_train_epochs": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = make_trainer(
        make_toy(16, variants=1), output / mode, k=3, callbacks=[Term(step)] if step else [], **fields
    )
    result = {}
    try:
        checkpoint = None if step else str(last_checkpoint(output / mode))
        trainer.train(checkpoint)
    except TrainingInterrupted as stop:
        result = {"signal": stop.name, "step": stop.step}
    (output / f"{mode}-{'asked' if step else 'resumed'}-{rank()}.json").write_text(
        json.dumps({**result, "losses": losses(trainer, "loss", "het")})
    )
    end_processes()


if __name__ == "__main__":
    import deepspeed  # noqa: F401  # so that the ranks, which are forked, need not each do it

    for kind in ("ddp", "zero2"):
        for at in (4, 0):
            start(main, Path(sys.argv[1]), kind, at)
