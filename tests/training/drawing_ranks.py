"""Two ranks train the toy and say what they drew in each step: ``drawing_ranks.py OUTPUT ONE``.

From the start, and from checkpoint ONE of a single process. Rank N writes OUTPUT/new-N.json and OUTPUT/joined-N.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from forked_ranks import start
from test_random_numbers import drawing_trainer

from ntpseg.training.distributed import end_processes, prepare_deepspeed, rank


def main(output: Path, name: str, checkpoint: str | None) -> None:
    """Train two steps from the start, or the second from a checkpoint."""
    torch.set_num_threads(1)
    prepare_deepspeed()
    trainer, drawn = drawing_trainer(output / name, per_device_train_batch_size=2)
    trainer.train(checkpoint)
    (output / f"{name}-{rank()}.json").write_text(json.dumps(drawn))
    end_processes()


if __name__ == "__main__":
    import deepspeed  # noqa: F401  # so that the ranks, which are forked, need not each do it

    start(main, Path(sys.argv[1]), "new", None)
    start(main, Path(sys.argv[1]), "joined", sys.argv[2])
