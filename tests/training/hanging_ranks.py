"""Two ranks train the toy, and one of them stands still: ``hanging_ranks.py OUTPUT``.

In OUTPUT/sleep rank 1 sleeps in a forward pass, in OUTPUT/stop it is stopped by SIGSTOP. What the ranks print goes to
OUTPUT/<case>/rank-N.log, their exit codes to OUTPUT/<case>/codes.json.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from toy import make_toy, make_trainer

from ntpseg.training.hang import HangWatch

SECONDS, STEP = 3.0, 3


def train(case: str, output: Path) -> None:
    trainer = make_trainer(make_toy(16, variants=1), output, num_train_epochs=3, per_device_train_batch_size=2)
    rank = dist.get_rank()
    forward = trainer.model.forward

    def stand_still(*args, **inputs):
        if trainer.state.global_step == STEP and rank == 1 and case == "sleep":
            time.sleep(1000)
        if trainer.state.global_step == STEP and rank == 1 and case == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        return forward(*args, **inputs)

    trainer.model.forward = stand_still
    watch = HangWatch(output, SECONDS, rank, 2)
    trainer.add_callback(watch)
    with watch:
        trainer.train()
    dist.destroy_process_group()


def start(case: str, output: Path, rank: int, port: int) -> int:
    """Fork a rank; its process id."""
    if pid := os.fork():
        return pid
    log = os.open(output / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    torch.set_num_threads(1)
    code = 1
    try:
        train(case, output)
        code = 0
    finally:
        os._exit(code)


def main(output: Path) -> None:
    # What stands still leaves the processor alone: two cases at a time. One that gets on must not wait for it.
    for cases in (("sleep", "stop"), ("none",)):
        pids = {}
        for case in cases:
            (output / case).mkdir()
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            pids[case] = [start(case, output / case, rank, port) for rank in (0, 1)]
        for case, (first, second) in pids.items():
            codes = [os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])]
            if case == "stop":  # as torchrun does once a rank has ended
                os.kill(second, signal.SIGKILL)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]))
            (output / case / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
