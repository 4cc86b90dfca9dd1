"""Each part of a batch has random numbers of its own: dropout and replaced mask inputs of no two ranks are alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from forked_ranks import run
from toy import make_toy, make_trainer

from ntpseg.training.trainer import NTPSegTrainer


def drawing_trainer(output: Path, **fields) -> tuple[NTPSegTrainer, dict[str, list[float]]]:
    """A trainer of two steps, and what it draws in each, by the steps that were before it."""
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "hard_tokens": 0, **fields}
    trainer = make_trainer(make_toy(8), output, **options)
    drawn: dict[str, list[float]] = {}
    compute = trainer.compute_loss

    def loss_of(*arguments, **options):
        # Of a generator's state alone, so that what is drawn later stays what it was.
        with torch.random.fork_rng(devices=[]):
            drawn[str(trainer.state.global_step)] = torch.rand(3).tolist()
        return compute(*arguments, **options)

    trainer.compute_loss = loss_of
    return trainer, drawn


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> tuple[Path, dict[str, list[float]]]:
    """What two ranks drew, and one process of the same seed."""
    output = tmp_path_factory.mktemp("ranks")
    trainer, drawn = drawing_trainer(output / "one")
    trainer.train()
    run("drawing_ranks.py", str(output), str(output / "one" / "checkpoint-1"))
    return output, drawn


def test_ranks_draw_apart(ranks) -> None:
    output, alone = ranks
    first, second = (json.loads((output / f"new-{rank}.json").read_text()) for rank in range(2))
    assert first["0"] == alone["0"], "the first one as a single process"
    assert all(first[step] != second[step] for step in ("0", "1"))


def test_a_rank_that_joins_draws_otherwise_than_those_that_were_there(ranks) -> None:
    output, alone = ranks
    first, second = (json.loads((output / f"joined-{rank}.json").read_text()) for rank in range(2))
    assert list(first) == list(second) == ["1"]
    assert first["1"] == alone["1"] != second["1"]


@pytest.mark.parametrize(("rank", "seed"), [(0, 0), (1, 0), (2, 1), (3, 1)])
def test_ranks_that_share_sequences_draw_alike(tmp_path, monkeypatch, rank, seed) -> None:
    trainer, _ = drawing_trainer(tmp_path)
    monkeypatch.setattr(trainer, "sequence_parallel_size", 2)
    monkeypatch.setattr(type(trainer.args), "process_index", property(lambda self: rank))
    torch.manual_seed(0)
    trainer.seed_ranks()
    found = torch.rand(3)
    torch.manual_seed(seed)
    assert torch.equal(found, torch.rand(3))
