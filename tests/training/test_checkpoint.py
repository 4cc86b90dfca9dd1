"""Checkpoints: any damage of any file is told, the newest whole one is taken, nothing in one is executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from toy import losses, make_toy, make_trainer

from ntpseg.memory import HardTokenMemory
from ntpseg.training import checkpoint as module
from ntpseg.training.checkpoint import choose_checkpoint, fault, load_memory, memory_file, save_memory
from ntpseg.training.pickles import find_unsafe

RUN = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}
FILES = ("model.safetensors", "config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "hard_tokens_0.pt")
FILES += ("trainer_state.json", "loss_means.json", "parallelism.json", "manifest.json")
# Without a manifest nothing says that these were there.
UNTOLD = ("config.json", "hard_tokens_0.pt", "loss_means.json", "parallelism.json", "manifest.json")


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(b ^ 255 for b in data[middle : middle + 64]) + data[middle + 64 :]


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda data: None,
    "empty": lambda data: b"",
    "cut to half": lambda data: data[: len(data) // 2],
    "64 bytes flipped": flip,
}


def spoil(path: Path, how: str) -> None:
    data = DAMAGE[how](path.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("trained")
    make_trainer(make_toy(8, variants=1), run, **RUN).train()
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy with checkpoint-2 and checkpoint-4."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_every_file_is_in_the_manifest(trained) -> None:
    for step in (2, 4):
        folder = trained / f"checkpoint-{step}"
        assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == set(FILES)
        assert {*json.loads((folder / "manifest.json").read_text())["sha256"], "manifest.json"} == set(FILES)
        assert fault(folder) is None


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_left_out_with_a_line(run, name, how, capsys) -> None:
    spoil(run / "checkpoint-4" / name, how)
    assert choose_checkpoint(run) == run / "checkpoint-2"
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith("left out checkpoint-4: ")
    assert name in line, line
    assert (run / "damaged-checkpoint-4").is_dir() and not (run / "checkpoint-4").exists()
    # The next damaged one of that step takes its place, and none that is whole is an error in one line.
    spoil(run / "checkpoint-2" / name, how)
    with pytest.raises(ValueError, match=rf"got none \(checkpoint-2: .*{name}.*--overwrite") as refused:
        choose_checkpoint(run)
    assert "\n" not in str(refused.value) and (run / "checkpoint-2").is_dir()


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors"])
def test_a_damaged_checkpoint_given_by_its_path_is_refused_in_a_line(run, name) -> None:
    spoil(run / "checkpoint-4" / name, "64 bytes flipped")
    with pytest.raises(
        ValueError, match=f"must be whole and hold data alone, .*{name} is not what was written"
    ) as told:
        make_trainer(make_toy(8, variants=1), run, **RUN).train(str(run / "checkpoint-4"))
    assert "\n" not in str(told.value)


def test_half_written_checkpoints_are_removed(run, monkeypatch, capsys) -> None:
    """As a kill leaves them: without a manifest, or before it says that all is there."""
    (run / "checkpoint-6").mkdir()
    module.begin(run / "checkpoint-8")
    shutil.copy(run / "checkpoint-4" / "trainer_state.json", run / "checkpoint-8")
    assert choose_checkpoint(run) == run / "checkpoint-4"
    assert capsys.readouterr().err.count("removed the incomplete checkpoint") == 2
    assert sorted(p.name for p in run.glob("*checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    # What an earlier attempt wrote does not stay in a new checkpoint of the same step.
    (run / "checkpoint-4" / "hard_tokens_1.pt").touch()
    module.begin(run / "checkpoint-4")
    assert [p.name for p in (run / "checkpoint-4").iterdir()] == ["manifest.json"]
    shutil.rmtree(run / "checkpoint-2")
    assert choose_checkpoint(run) is None


def age(checkpoint: Path) -> None:
    """Make it one of a release without manifests, which kept the Trainer's pickled arguments."""
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "training_args.bin").write_bytes(pickle.dumps(Planted("touch never")))


def test_a_checkpoint_of_an_earlier_release_is_taken_with_a_warning(run, capsys) -> None:
    age(run / "checkpoint-4")
    assert choose_checkpoint(run) == run / "checkpoint-4"
    assert "of an earlier release, without the hashes of its files" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["missing", "empty", "cut to half"])
@pytest.mark.parametrize("name", [n for n in FILES if n not in UNTOLD])
def test_what_can_be_told_of_an_earlier_release_is(run, name, how, capsys) -> None:
    age(run / "checkpoint-4")
    age(run / "checkpoint-2")
    spoil(run / "checkpoint-4" / name, how)
    if name == "trainer_state.json":
        (run / "checkpoint-4" / name).write_text('{"global_step": "4"') if how == "empty" else None
    assert choose_checkpoint(run) == run / "checkpoint-2"


def test_rotation_renames_before_it_deletes(run, monkeypatch) -> None:
    """Killed at any moment, what is called a checkpoint is a whole one."""
    seen: list[list[str]] = []
    rmtree = shutil.rmtree

    def look(path, *args, **kwargs):
        seen.append([fault(p) for _, p in module.checkpoints(run)])
        rmtree(path, *args, **kwargs)

    shutil.copytree(run / "checkpoint-4", run / "checkpoint-10")
    monkeypatch.setattr(shutil, "rmtree", look)
    module.rotate(run, 1, str(run / "checkpoint-2"))
    assert [step for step, _ in module.checkpoints(run)] == [2, 10], "the best and the newest"
    module.rotate(run, 1, None)
    assert [step for step, _ in module.checkpoints(run)] == [10]
    assert seen and not any(any(states) for states in seen)
    module.rotate(run, None, None)
    assert [step for step, _ in module.checkpoints(run)] == [10]


def test_the_manifest_is_written_when_all_files_are_and_before_rotation(tmp_path, monkeypatch) -> None:
    events: list[tuple[str, set[str]]] = []

    def names() -> set[str]:
        return {p.name for p in (tmp_path / "checkpoint-4").iterdir()}

    finish, rotate = module.finish, module.rotate
    trainer = make_trainer(make_toy(8, variants=1), tmp_path, save_total_limit=1, **RUN)
    monkeypatch.setattr(
        "ntpseg.training.checkpointing.finish",
        lambda f: (f.name == "checkpoint-4" and events.append(("finish", names())), finish(f)),
    )
    monkeypatch.setattr(
        "ntpseg.training.checkpointing.rotate",
        lambda *a: ((tmp_path / "checkpoint-4").is_dir() and events.append(("rotate", names())), rotate(*a)),
    )
    trainer.train()
    assert [name for name, _ in events] == ["finish", "rotate"]
    assert events[0][1] - {"training_args.bin"} == events[1][1] == set(FILES)
    assert [step for step, _ in module.checkpoints(tmp_path)] == [4]
    assert trainer.args.save_total_limit == 1


# ---- pickles


class Planted:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def plant(path: Path, command: str, kind: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "plain":
        path.write_bytes(pickle.dumps(Planted(command)))
    elif kind == "legacy":
        torch.save(Planted(command), path, _use_new_zipfile_serialization=False)
    else:
        with path.open("wb") as file:
            torch.save({"a": torch.ones(2), "b": Planted(command)}, file)


@pytest.mark.parametrize("kind", ["torch", "plain", "legacy"])
@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "hard_tokens_0.pt",
        "global_step4/mp_rank_00_model_states.pt",
        "global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "pytorch_model_fsdp_0/.metadata",
        "optimizer.bin",
    ],
)
def test_a_planted_pickle_is_found_and_not_run(run, name, kind, capsys) -> None:
    """Also where its hash was put into the manifest."""
    folder, proof = run / "checkpoint-4", run / "proof"
    plant(folder / name, f"touch {proof}", kind)
    module.finish(folder)
    assert choose_checkpoint(run) == run / "checkpoint-2"
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and name in line
    with pytest.raises(ValueError, match=f"must be whole and hold data alone, .*{name}"):
        make_trainer(make_toy(8, variants=1), run, **RUN).train(str(run / "damaged-checkpoint-4"))
    assert not proof.exists()


def test_pickles_through_side_doors_are_found(run, tmp_path) -> None:
    folder = run / "checkpoint-4"
    plant(tmp_path / "elsewhere" / "a.pt", "true", "torch")
    (folder / "latest").write_text("../../elsewhere")
    assert "latest must name a folder of the checkpoint" in (find_unsafe(folder) or "")
    (folder / "latest").unlink()
    (folder / "global_step4").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert "is a link" in (find_unsafe(folder) or "")
    (folder / "global_step4").unlink()
    assert find_unsafe(folder) is None


def test_every_load_of_a_resumed_run_reads_weights_only(run, tmp_path, monkeypatch) -> None:
    """Between the search and the reading a file may be exchanged; DeepSpeed asks for `weights_only=False`."""
    plant(tmp_path / "a.pt", f"touch {tmp_path / 'proof'}", "torch")

    def load(self, *args, **kwargs):
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "a.pt", weights_only=False)
        raise InterruptedError

    trainer = make_trainer(make_toy(8, variants=1), run, **RUN)
    monkeypatch.setattr(type(trainer), "_load_from_checkpoint", load)
    with pytest.raises(InterruptedError):
        trainer.train(str(run / "checkpoint-2"))
    assert not (tmp_path / "proof").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_sharded_checkpoint_of_pytorch_passes(tmp_path) -> None:
    import torch.distributed.checkpoint as dcp

    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.save(state, checkpoint_id=tmp_path / "pytorch_model_fsdp_0", no_dist=True)
    assert (tmp_path / "pytorch_model_fsdp_0" / ".metadata").is_file()
    assert find_unsafe(tmp_path) is None


# ---- resuming


def test_weights_that_do_not_fit_are_refused(run) -> None:
    from safetensors.torch import load_file, save_file

    path = run / "checkpoint-4" / "model.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    for changed, message in (
        ({k: v for k, v in weights.items() if k != name}, f"without '{name}'"),
        ({**weights, "stray": torch.ones(1)}, "with 'stray'"),
    ):
        save_file(changed, path, metadata={"format": "pt"})
        module.finish(path.parent)
        with pytest.raises(ValueError, match=f"checkpoint must hold the weights of this model, got one {message}"):
            make_trainer(make_toy(8, variants=1), run, **RUN).train(str(path.parent))


def test_a_finished_run_gets_no_further_step(trained, tmp_path) -> None:
    fields = {**RUN, "max_steps": 3, "num_train_epochs": 5}
    make_trainer(make_toy(16, variants=1), tmp_path, **fields).train()
    again = make_trainer(make_toy(16, variants=1), tmp_path, **fields)
    again.train(True)
    assert again.state.global_step == 3


def test_another_number_of_pairs_per_step_is_told(run, capsys) -> None:
    for batch, told in ((4, False), (2, True)):
        trainer = make_trainer(make_toy(8, variants=1), run, **RUN, per_device_train_batch_size=batch)
        trainer.train(str(run / "checkpoint-2"))
        assert ("step 2 was epoch 1.000 and is 0.500 now" in capsys.readouterr().err) == told
    assert losses(trainer)


# ---- ranks


def fill(memory: HardTokenMemory, ids: list[int]) -> None:
    generator = torch.Generator().manual_seed(ids[0])
    prediction, labels = torch.randint(0, 5, (2, len(ids), 12), generator=generator)
    memory.record(torch.tensor(ids), prediction, labels, torch.rand(len(ids), 12, generator=generator))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 2), (3, 2), (2, 2), (2, 3)])
def test_no_rank_s_errors_are_lost_when_the_number_of_ranks_changes(tmp_path, before, after) -> None:
    """Of the running epoch each rank has recorded its own samples; together the new ranks have all of them."""
    whole = HardTokenMemory(8, 3)
    for rank in range(before):
        memory = HardTokenMemory(8, 3)
        for each in (memory, whole):
            fill(each, list(range(rank, 8, before)))
        save_memory(memory, tmp_path, rank)
    assert memory_file(tmp_path, before - 1).is_file()
    loaded = [HardTokenMemory(8, 3) for _ in range(after)]
    for rank, memory in enumerate(loaded):
        load_memory(memory, tmp_path, rank, after, vocab_size=5)
    for memory in loaded[1:]:
        loaded[0].merge_state_dict(memory.state_dict())  # as `sync` does at the end of the epoch
    for each in (loaded[0], whole):
        each.advance()
    expected, result = whole.lookup(torch.arange(8)), loaded[0].lookup(torch.arange(8))
    assert (expected.token >= 0).any(1).all()
    assert torch.equal(result.position, expected.position) and torch.equal(result.token, expected.token)


def test_a_token_outside_the_vocabulary_is_refused(run) -> None:
    path = run / "checkpoint-4" / "hard_tokens_0.pt"
    saved = torch.load(path, weights_only=True)
    saved["recording"]["token"][0] = 10_000
    torch.save(saved, path)
    module.finish(path.parent)
    with pytest.raises(
        ValueError, match=r"hard_tokens_0.pt cannot be resumed from: the state's recording.token must be in"
    ):
        make_trainer(make_toy(8, variants=1), run, **RUN).train(str(run / "checkpoint-4"))
