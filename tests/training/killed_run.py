"""Trains the toy and dies by SIGKILL in the middle of step `KILL_AT`.

``python killed_run.py OUTPUT KILL_AT [CACHE KEY]``; with the pixel cache KEY of the folder CACHE the toy has a stem.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from toy import make_toy, make_trainer
from transformers import TrainerCallback

from ntpseg.training.callbacks import JsonLog

RUN = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 2}


class Kill(TrainerCallback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def main(output: Path, kill_at: int, *cache: str) -> None:
    torch.set_num_threads(1)
    callbacks = [JsonLog(output), Kill(kill_at)]
    if cache:
        import pixel_toy

        pixels = pixel_toy.PixelCache.open(*cache)
        pixel_toy.make_trainer(pixels, output, mask_inputs=pixel_toy.MASK_INPUTS, callbacks=callbacks, **RUN).train()
    else:
        make_trainer(make_toy(16, variants=1), output, callbacks=callbacks, **RUN).train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
