"""A run goes on with its own data and tokens alone, from whatever a kill left of its folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_pipeline import FAST, write_data
from typer.testing import CliRunner

from ntpseg.cli import app
from ntpseg.models import Bundle
from ntpseg.training import load_config, train
from ntpseg.training.config import RunConfig, dump_config
from ntpseg.training.pipeline import _prepare_directory
from ntpseg.training.preparation import prepare_run
from ntpseg.utils.lock import folder_lock

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with the data and a run of one epoch on it."""
    folder = tmp_path_factory.mktemp("trained")
    write_data(folder / "data", 4, 2)
    train(_config(folder), progress=False)
    return folder


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def _config(folder: Path, *more: str) -> RunConfig:
    settings = [*FAST, "training.num_train_epochs=1", *more]
    return load_config("tiny", [f"data.path={folder / 'data'}", f"output={folder / 'run'}", *settings])


def moved(folder: Path) -> RunConfig:
    """The configuration of a copied run, its data beside it."""
    config = _config(folder)
    (folder / "run" / "config.yaml").write_text(dump_config(config))
    return config


def append(folder: Path, *lines: str) -> None:
    with (folder / "data" / "manifest.csv").open("a") as file:
        file.writelines(f"{line}\n" for line in lines)


def add_pair(folder: Path, split: str = "train") -> None:
    for kind in "im":
        shutil.copy(folder / "data" / f"{kind}0.png", folder / "data" / f"{kind}9.png")
    append(folder, f"i9.png,m9.png,A ring.,{split}")


def edit_mask(folder: Path) -> None:
    """In place, of the same size on the disk and with the same time stamp."""
    path = folder / "data" / "m1.png"
    before = path.stat()
    mask = np.array(Image.open(path))
    Image.fromarray(mask[::-1].copy()).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def edit_caption(folder: Path) -> None:
    table = folder / "data" / "manifest.csv"
    table.write_text(table.read_text().replace("i2.png,m2.png,A disc", "i2.png,m2.png,One disc"))


def remove_pair(folder: Path) -> None:
    table = folder / "data" / "manifest.csv"
    table.write_text("".join(line for line in table.read_text().splitlines(True) if not line.startswith("i3.png")))


def replace_image(folder: Path) -> None:
    shutil.copy(folder / "data" / "i1.png", folder / "data" / "i0.png")


def swap_splits(folder: Path) -> None:
    table = folder / "data" / "manifest.csv"
    lines = table.read_text().splitlines()
    lines = [line.replace(",train", ",val") if line.startswith("i0") else line for line in lines]
    table.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_pair, r"1 pair more \('i9'\)"),
        (lambda folder: add_pair(folder, "val"), r"1 pair more \('i9'\)"),
        (edit_mask, r"1 mask changed \('i1'\)"),
        (edit_caption, r"1 caption changed \('i2'\)"),
        (remove_pair, r"1 pair gone \('i3'\)"),
        (replace_image, r"1 image changed \('i0'\)"),
        (swap_splits, r"1 pair more \('i0'\), 1 pair gone \('i0'\)"),
        (lambda folder: (folder / "data" / "m4.png").unlink(), r"1 pair gone \('i4'\)"),
        (lambda folder: shutil.rmtree(folder / "data"), "got: path must be an existing data set"),
    ],
)
def test_changed_data_is_refused_with_what_changed_and_the_cure(folder, change: Callable, message: str) -> None:
    config = moved(folder)
    change(folder)
    before = {p: p.read_bytes() for p in (folder / "run").rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(ValueError, match=rf"resume must find the data .*{message}.*put (that|it) back") as refused:
        train(config, resume=True, progress=False)
    assert "\n" not in str(refused.value)
    after = {p: p.read_bytes() for p in (folder / "run").rglob("*") if p.is_file() and p.name != ".lock"}
    assert before == after


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: add_pair(folder, "test"),
        lambda folder: (folder / "data" / "note.txt").write_text("mine"),
        lambda folder: os.utime(folder / "data" / "m1.png", (0, 0)),
    ],
)
def test_what_the_run_does_not_read_may_change(folder, change: Callable) -> None:
    config = moved(folder)
    change(folder)
    _prepare_directory(config, folder / "run", resume=True, overwrite=False)


def test_the_order_of_rows_may_change_and_damaged_tokens_are_made_as_they_were(folder, capsys) -> None:
    config, run = moved(folder), folder / "run"
    prepared = prepare_run(config, run, progress=False)
    codes, keys = np.array(prepared.training.mask_codes), (prepared.training.key, prepared.validation.key)
    table = folder / "data" / "manifest.csv"
    header, *lines = table.read_text().splitlines()
    table.write_text("\n".join([header, *lines[::-1]]) + "\n")
    for key in keys:
        path = run / "cache" / key / "mask_codes.npy"
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    capsys.readouterr()
    _prepare_directory(config, run, resume=True, overwrite=False)
    again = prepare_run(config, run, progress=False)
    assert (again.training.key, again.validation.key) == keys
    assert np.array_equal(again.training.mask_codes, codes)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("building the damaged cache ")]
    assert len(told) == 2
    # A cache that is gone is built again too, but never from other data.
    shutil.rmtree(run / "cache")
    assert prepare_run(config, run, progress=False).training.key == keys[0]
    assert capsys.readouterr().err.count(": it is gone\n") == 2
    shutil.rmtree(run / "cache")
    edit_mask(folder)
    with pytest.raises(ValueError, match="must be built from the data that it was made of"):
        prepare_run(config, run, progress=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("prepared.json", "prepared.json must say what was prepared"),
        ("data.jsonl", "data.jsonl must hold the data of the run"),
        ("tokenizers/vision/model.safetensors", "tokenizers must be whole, .* vision/model.safetensors is cut off"),
        ("tokenizers/text/tokenizer.json", "tokenizers must be whole, .* text/tokenizer.json is cut off"),
        ("tokenizers/manifest.json", "tokenizers must be whole, .* manifest.json is damaged"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(folder, name, message) -> None:
    config, path = moved(folder), folder / "run" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{message}.*--overwrite") as refused:
        train(config, resume=True, progress=False)
    assert "\n" not in str(refused.value)


def test_a_second_training_into_one_output_is_refused(folder) -> None:
    moved(folder)
    run = folder / "run"
    script = "import sys, time; from pathlib import Path; from ntpseg.utils.lock import folder_lock\n"
    script += "with folder_lock(Path(sys.argv[1]), 'output'): print(flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", script, str(run)], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        holder.stdout.readline()
        files = sorted(run.rglob("*"))
        for options in ((), ("--resume",), ("--overwrite",)):
            result = CliRunner().invoke(app, ["train", str(run), *options])
            assert isinstance(result.exception, ValueError)
            assert f"process {holder.pid} on " in str(result.exception)
        assert sorted(run.rglob("*")) == files
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


# ---- what a kill leaves


def first_start(folder: Path, left: Callable[[Path], None]) -> None:
    """Train into a folder in which a killed start has left something, without any option."""
    run = folder / "new"
    run.mkdir()
    left(run)
    config = _config(folder)
    config.output = str(run)
    _prepare_directory(config, run, resume=False, overwrite=False)
    assert (run / "config.yaml").is_file()


@pytest.mark.parametrize(
    "left",
    [
        lambda run: None,
        lambda run: (run / ".lock").touch(),
        lambda run: (run / ".config.yaml.k3x9.tmp").write_text("data:\n  pa"),
        lambda run: (run / ".building-model.k3x9").mkdir(),
    ],
)
def test_a_killed_first_start_leaves_a_folder_that_train_accepts(folder, left) -> None:
    first_start(folder, left)


def test_a_foreign_folder_is_left_as_it_is(folder) -> None:
    with pytest.raises(ValueError, match="output must be new"):
        first_start(folder, lambda run: (run / "mine.txt").touch())
    config = _config(folder)
    config.output = str(folder / "new")
    with pytest.raises(ValueError, match="is not a run"):
        train(config, overwrite=True, progress=False)
    assert [p.name for p in (folder / "new").iterdir()] == ["mine.txt"]


def killed_at(rename: int, function: Callable[[], None]) -> bool:
    """Whether a process that calls `function` died before its `rename`-th change of a name."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
    count = 0

    def dying(change: Callable[..., None]) -> Callable[..., None]:
        def counted(*paths) -> None:
            nonlocal count
            count += 1
            if count == rename:
                os._exit(9)  # nothing cleans up
            change(*paths)

        return counted

    try:
        os.rename, os.replace = dying(os.rename), dying(os.replace)
        function()
    finally:
        os._exit(0)


def test_a_start_killed_anywhere_can_be_started_again(folder) -> None:
    config, run = _config(folder), folder / "new"
    config.output = str(run)
    for rename in range(1, 10):
        if not killed_at(rename, partial(_begin, config, run)):
            break
        _begin(config, run)
        shutil.rmtree(run)
    assert rename == 2, "the configuration's"


def test_an_overwrite_killed_anywhere_can_be_started_again(folder, tmp_path) -> None:
    for rename in range(1, 40):
        copy = Path(shutil.copytree(folder, tmp_path / str(rename)))
        config, run = moved(copy), copy / "run"
        if not killed_at(rename, partial(_begin, config, run, overwrite=True)):
            break
        if (run / "prepared.json").is_file():
            with pytest.raises(ValueError, match="give --resume to go on or --overwrite"):
                _begin(config, run)
            _begin(config, run, resume=True)
            _begin(config, run, overwrite=True)
        else:
            assert not list(run.glob("checkpoint-*")) and not (run / "model").exists()
            _begin(config, run)
        assert {p.name for p in run.iterdir()} - {".lock", "cache"} == {"config.yaml"}
    assert rename > 8


def _begin(config: RunConfig, run: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    with folder_lock(run, "output"):
        _prepare_directory(config, run, resume=resume, overwrite=overwrite)


def test_a_kill_between_the_old_and_the_new_model_leaves_a_model(folder) -> None:
    run = folder / "run"
    (run / "model").rename(run / "model.part")
    bundle = Bundle.from_pretrained(run)
    assert bundle.vision.fingerprint()
    # One that was not written to its end is none.
    (run / "model.part" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="holds no trained model"):
        Bundle.from_pretrained(run)
    train(moved(folder), resume=True, progress=False)
    assert not (run / "model.part").exists()
    assert Bundle.from_pretrained(run).vision.fingerprint() == bundle.vision.fingerprint()


def test_the_lock_is_free_after_a_training(folder) -> None:
    train(moved(folder), resume=True, progress=False)
    with folder_lock(folder / "run", "output"):
        pass


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "hard_tokens_0.pt"])
def test_resume_by_command_goes_on_from_the_former_checkpoint(folder, name, capfd) -> None:
    """To the same model as without the damage."""
    moved(folder)
    run = folder / "run"
    more = ["train", str(run), "--resume", "training.num_train_epochs=3", "training.save_total_limit=5"]
    more += ["training.eval_strategy=no"]
    assert CliRunner().invoke(app, more).exit_code == 0
    expected = (run / "model" / "model.safetensors").read_bytes()
    path = run / "checkpoint-3" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (run / "model" / "model.safetensors").unlink()
    result = CliRunner().invoke(app, more)
    assert result.exit_code == 0
    assert (run / "model" / "model.safetensors").read_bytes() == expected
    assert f"left out checkpoint-3: {name} is cut off" in result.output + capfd.readouterr().err
