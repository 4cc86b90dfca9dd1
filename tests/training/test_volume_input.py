"""A model remembers the axis and the window of the slices that it was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_pipeline import FAST, write_data

from ntpseg.data import Record, SlicePlace
from ntpseg.generation import Segmenter
from ntpseg.models import Bundle
from ntpseg.models.volume_input import VolumeInput
from ntpseg.training import load_config, train
from ntpseg.training.folder_data import views_of
from ntpseg.training.preparation import prepare_run, volume_input


def record(place: SlicePlace | None) -> Record:
    return Record(Path("i.png"), Path("m.png"), "A disc.", "train", "i", "p", "", place)


def place(axis: str = "axial", window: str = "lung") -> SlicePlace:
    return SlicePlace("v", axis, 3, window=window)


@pytest.mark.parametrize(
    ("places", "known"),
    [
        ([place(), place()], VolumeInput("axial", "lung")),
        ([place(), place("coronal")], VolumeInput(None, "lung")),
        ([place(), place(window="bone")], VolumeInput("axial", None)),
        ([place(), None], VolumeInput()),
        ([place(), place(window="")], VolumeInput("axial", None)),
        ([None], VolumeInput()),
        ([SlicePlace(row_mm=0.2, column_mm=0.2)], VolumeInput()),
    ],
)
def test_only_what_all_records_share_is_a_default(places: list[SlicePlace | None], known: VolumeInput) -> None:
    assert volume_input(views_of(record(p) for p in places)) == known


def test_training_on_slices_gives_a_model_that_remembers(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", train_pairs=4, val_pairs=0)
    table = data / "manifest.csv"
    header, *rows = table.read_text(encoding="utf-8").splitlines()
    lines = [f"{header},subject,volume,axis,slice,window"]
    lines += [f"{row},s{n},v{n},coronal,5,-160..240" for n, row in enumerate(rows)]
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    run = tmp_path / "run"
    config = load_config("tiny", [*FAST, "training.num_train_epochs=1", f"data.path={data}", f"output={run}"])
    train(config, progress=False)
    known = VolumeInput("coronal", "-160..240")
    assert Bundle.from_pretrained(run).volume == known
    assert Segmenter.from_pretrained(run).bundle.volume == known
    # What a resumed run reads, and one that an earlier version has prepared.
    assert prepare_run(config, run, progress=False).volume == known
    keys = json.loads((run / "prepared.json").read_text(encoding="utf-8"))
    del keys["volume"]
    (run / "prepared.json").write_text(json.dumps(keys), encoding="utf-8")
    assert prepare_run(config, run, progress=False).volume == VolumeInput()
