"""Hard tokens in mapped files: a run with them has the losses of one without, also when it is resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from toy import losses, make_toy, make_trainer

from ntpseg.training.checkpoint import fault
from ntpseg.training.config import load_config
from ntpseg.training.hard_tokens import mapped_folder

RUN = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}


def test_mapped_memory_trains_and_resumes_as_one_on_the_device(tmp_path: Path) -> None:
    toy = make_toy(8)
    expected = make_trainer(toy, tmp_path / "expected", num_train_epochs=3)
    expected.train()
    mapped = {"storage": "mapped", "path": tmp_path / "memory"}
    trainer = make_trainer(toy, tmp_path / "run", memory_options=mapped, **RUN)
    trainer.train()
    assert losses(trainer, "loss", "het") == losses(expected, "loss", "het")
    assert losses(expected, "het")[-1][0] > 0
    last, before = (tmp_path / "run" / f"checkpoint-{step}" for step in (6, 5))
    linked = {path.name for path in last.glob("hard_tokens_0-*.pt") if path.stat().st_nlink > 1}
    assert linked and linked <= json.loads((last / "manifest.json").read_text())["sha256"].keys()
    assert fault(last) is None and fault(before) is None
    resumed = make_trainer(toy, tmp_path / "run", memory_options={**mapped, "path": tmp_path / "again"}, **RUN)
    resumed.train(str(tmp_path / "run" / "checkpoint-4"))
    assert losses(resumed, "loss", "het")[-2:] == losses(expected, "loss", "het")[-2:]
    shutil.rmtree(tmp_path / "memory")


def test_folders_of_runs_that_share_a_disk_differ(tmp_path: Path) -> None:
    loss = load_config("tiny", overrides=["loss.hard_token_storage=mapped"]).loss
    assert mapped_folder(loss, tmp_path / "run", 1) == tmp_path / "run" / "hard_tokens" / "rank-1"
    loss.hard_token_path = str(tmp_path / "scratch")
    folders = [mapped_folder(loss, tmp_path / name / "run", 0) for name in ("a", "b")]
    assert len(set(folders)) == 2
    for folder in folders:
        assert folder.is_relative_to(tmp_path / "scratch")
        folder.mkdir()
        (folder / "rows").write_bytes(b"of a run before")
    mapped_folder(loss, tmp_path / "a" / "run", 0)
    assert [folder.exists() for folder in folders] == [False, True]
    loss.hard_token_storage = "pinned"
    assert mapped_folder(loss, tmp_path / "run", 0) is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.hard_token_storage=tape", "loss.hard_token_storage must be one of device, pinned, mapped, got 'tape'"),
        ("loss.hard_token_sync_steps=-1", "loss.hard_token_sync_steps must be"),
        ("loss.hard_token_path=x", "loss.hard_token_path must be null unless loss.hard_token_storage is mapped, got"),
    ],
)
def test_wrong_settings_are_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("tiny", overrides=[override])
