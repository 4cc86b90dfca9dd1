"""The global batch and the random state of a checkpoint under another number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ntpseg.training import load_config
from ntpseg.training.arguments import training_arguments
from ntpseg.training.parallelism import Parallelism, fit_batch
from ntpseg.training.pipeline import _keep_global_batch
from ntpseg.training.resharding import write_random_state


@pytest.mark.parametrize(
    ("saved", "now", "fitted"),
    [
        ((2, 4, 1), (1, 4, 1), (4, 2)),
        ((1, 4, 2), (2, 4, 2), (4, 1)),
        ((1, 8, 1), (2, 8, 1), (4, 1)),  # a smaller batch where less than one micro-batch is left
        ((8, 3, 2), (16, 2, 1), (1, 3)),
        ((2, 6, 1), (3, 4, 3), (4, 1)),
        ((2, 4, 1), (1, 8, 1), None),  # already right
        ((2, 4, 1), (2, 8, 1), None),  # the ranks are the same: the batch was changed on purpose
        ((2, 0, 0), (1, 4, 1), None),  # of an earlier release
        ((8, 4, 1, 4), (4, 4, 1), (2, 1)),  # 4 ranks had the same pairs, which are 8 a step
        ((8, 4, 1, 4), (2, 8, 1), None),  # two groups then, two readers now: changed on purpose
        ((4, 2, 2, 2), (1, 8, 1), None),
    ],
)
def test_the_global_batch_stays(saved, now, fitted) -> None:
    before = Parallelism("plain", *saved)
    assert fit_batch(before, *now) == fitted
    if fitted is not None:
        assert now[0] * fitted[0] * fitted[1] == before.pairs


def test_ranks_that_share_sequences_have_the_same_pairs(tmp_path: Path) -> None:
    shared = Parallelism("zero3", 8, 3, 2, sequence_parallel_size=4)
    assert shared.data_parallel_size == 2 and shared.pairs == 12
    shared.save(tmp_path)
    assert Parallelism.read(tmp_path) == shared
    # As before they were noted.
    (tmp_path / "parallelism.json").write_text('{"kind": "zero3", "ranks": 8, "batch": 3, "accumulation": 2}')
    assert Parallelism.read(tmp_path).pairs == 48
    (tmp_path / "parallelism.json").write_text(
        '{"kind": "zero3", "ranks": 8, "batch": 3, "accumulation": 2, "sequence_parallel_size": 3}'
    )
    with pytest.raises(ValueError, match=r"parallelism\.json must say how the run was divided"):
        Parallelism.read(tmp_path)


def test_a_global_batch_that_does_not_divide_says_what_does() -> None:
    with pytest.raises(ValueError, match=r"8 pairs \(2 x 4 x accumulation 1\), got 3; start one of 1, 2, 4, 8$"):
        fit_batch(Parallelism("zero2", 2, 4, 1), 3, 4, 1)


def test_a_run_on_other_ranks_is_fitted_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Parallelism("zero2", 4, 4, 1).save(tmp_path)
    config = load_config("tiny", ["training.per_device_train_batch_size=4"])
    args = training_arguments(config, tmp_path)
    assert _keep_global_batch(config, args, tmp_path)
    assert training_arguments(config, tmp_path).gradient_accumulation_steps == 4
    line = "4 -> 1 ranks: gradient_accumulation_steps 1 -> 4, so that a step still takes 16 pairs\n"
    assert capsys.readouterr().err == line
    assert not _keep_global_batch(config, training_arguments(config, tmp_path), tmp_path)
    assert capsys.readouterr().err == ""


def test_shared_sequences_are_no_further_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Eight ranks in groups of four read 16 pairs a step, as eight micro-batches of two on one rank do."""
    Parallelism("zero3", 8, 8, 1, sequence_parallel_size=4).save(tmp_path)
    config = load_config("tiny", ["training.per_device_train_batch_size=2"])
    assert _keep_global_batch(config, training_arguments(config, tmp_path), tmp_path)
    assert training_arguments(config, tmp_path).gradient_accumulation_steps == 8
    assert capsys.readouterr().err.endswith("so that a step still takes 16 pairs\n")
    shared = load_config("tiny", ["training.sequence_parallel_size=2", "data.mask_noise=0"])
    with pytest.raises(ValueError, match=r"sequence_parallel_size must divide the number of ranks, 1, got 2"):
        _keep_global_batch(shared, training_arguments(shared, tmp_path), tmp_path)


def test_it_is_kept_with_a_checkpoint(tmp_path: Path) -> None:
    parallelism = Parallelism("zero3", 4, 2, 8)
    parallelism.save(tmp_path)
    assert Parallelism.read(tmp_path) == parallelism and parallelism.pairs == 64
    (tmp_path / "parallelism.json").write_text('{"kind": "zero9", "ranks": 1, "batch": 1, "accumulation": 1}')
    with pytest.raises(ValueError, match=r"parallelism\.json must say how the run was divided"):
        Parallelism.read(tmp_path)


@pytest.mark.parametrize(
    ("files", "kind", "ranks"),
    [
        (("rng_state.pth", "optimizer.pt"), "plain", 1),
        (("rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"), "plain", 2),
        (("rng_state_0.pth", "global_step3/zero_pp_rank_0_mp_rank_00_model_states.pt"), "zero3", 1),
        (("rng_state_0.pth", "rng_state_1.pth", "global_step3/mp_rank_00_model_states.pt"), "zero2", 2),
        (("rng_state_0.pth", "rng_state_1.pth", "pytorch_model_fsdp_0/.metadata"), "fsdp", 2),
    ],
)
def test_checkpoints_of_earlier_releases_are_told_by_their_files(tmp_path: Path, files, kind, ranks) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert Parallelism.read(tmp_path) == Parallelism(kind, ranks)


@pytest.mark.parametrize(("saved", "rank", "now", "source"), [(2, 0, 1, 0), (1, 1, 2, 0), (2, 2, 3, 0), (3, 1, 2, 1)])
def test_each_rank_has_a_random_state(tmp_path: Path, saved: int, rank: int, now: int, source: int) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for number in range(saved):
        name = "rng_state.pth" if saved == 1 else f"rng_state_{number}.pth"
        torch.save({"cpu": torch.tensor(number)}, tmp_path / name)
    write_random_state(tmp_path, Parallelism("plain", saved), rank, Parallelism("plain", now), out)
    (written,) = out.iterdir()
    assert written.name == ("rng_state.pth" if now == 1 else f"rng_state_{rank}.pth")
    assert int(torch.load(written, weights_only=True)["cpu"]) == source


@pytest.mark.parametrize(("rank", "source"), [(0, 0), (1, 0), (2, 1), (3, 1), (4, 0)])
def test_ranks_that_share_sequences_share_random_numbers(tmp_path: Path, rank: int, source: int) -> None:
    """From two ranks on to groups of two: mask inputs and dropout of one sequence are drawn alike."""
    (tmp_path / "out").mkdir()
    for number in range(2):
        torch.save({"cpu": torch.tensor(number)}, tmp_path / f"rng_state_{number}.pth")
    now = Parallelism("plain", 6, sequence_parallel_size=2)
    write_random_state(tmp_path, Parallelism("plain", 2), rank, now, tmp_path / "out")
    assert int(torch.load(tmp_path / "out" / f"rng_state_{rank}.pth", weights_only=True)["cpu"]) == source
