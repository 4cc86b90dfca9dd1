"""Volumes counted, their gaps noted, and millimetres from a file's own header."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dataset_files import picture, save
from test_slice_columns import PLACE, manifest
from typer.testing import CliRunner

from ntpseg.cli import app
from ntpseg.data import MaskOptions, Record, SlicePlace, inspect_dataset
from ntpseg.data.slice_stats import slice_stats
from ntpseg.data.spacing import pixel_mm


def rows(volume: str, indices: range | list[int], **cells: str) -> list[dict[str, str]]:
    return [PLACE | {"volume": volume, "slice": str(index)} | cells for index in indices]


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    """Two CT volumes (the second with gaps and two structures) and an MR volume of every second slice; an X-ray."""
    table = rows("a", range(4)) + rows("b", [3, 4, 8, 10], row_mm="0.9")
    table += rows("b", [3], row_mm="0.9", structure="spleen")
    table += rows("c", [0, 2, 4], split="test", modality="MR", axis="coronal", window="", slice_mm="")
    path = manifest(tmp_path, [*table, {"split": "test"}])
    save(tmp_path / "m0.png", np.zeros((16, 16), np.uint8))
    return path


def test_groups_of_split_and_modality(volumes: Path) -> None:
    checked = inspect_dataset(volumes, masks=MaskOptions(keep_empty=True))
    assert checked.problems == []
    train, unknown, mr = slice_stats(checked.records, checked.empty)
    assert (train.split, train.modality, train.volumes, train.slices, train.pairs, train.empty) == (
        "train", "CT", 2, 8, 9, 1,
    )  # fmt: skip
    assert (train.axes, train.windows, train.unknown) == (("axial",), ("lung",), 0)
    assert (train.slice_mm, train.row_mm, train.column_mm) == ((2.5, 2.5), (0.8, 0.9), (0.7, 0.7))
    assert (unknown.modality, unknown.volumes, unknown.slices, unknown.unknown) == ("", 0, 1, 1)
    assert (mr.split, mr.modality, mr.volumes, mr.axes, mr.slice_mm) == ("test", "MR", 1, ("coronal",), None)


def test_commands_show_them(volumes: Path) -> None:
    for command in (["check", "--keep-empty"], ["stats"]):
        result = CliRunner().invoke(app, ["data", command[0], str(volumes), *command[1:]], env={"COLUMNS": "160"})
        assert result.exit_code == 0, result.output
        cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.output.splitlines()]
        assert ["train", "CT", "2", "8", "9", "1", "axial", "2.5, 0.8..0.9, 0.7", "lung"] in cells
        assert ["test", "MR", "1", "3", "3", "0", "coronal", "?, 0.8, 0.7", ""] in cells


def test_no_table_without_volumes(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["data", "check", str(manifest(tmp_path, [{}, {}]))])
    assert result.exit_code == 0 and "Volumes" not in result.output


def test_gaps_are_notes(volumes: Path) -> None:
    notes = inspect_dataset(volumes, masks=MaskOptions(keep_empty=True)).notes
    found = [(note.split, note.name, note.detail) for note in notes if note.kind == "volume with gaps"]
    assert found == [("train", "b", "4 of its slices 3..10 are not here (between slices 4 and 8, ...)")]


def test_slices_of_a_volume_have_one_size(tmp_path: Path) -> None:
    path = manifest(tmp_path, rows("a", range(3)))
    for name in ("i1.png", "m1.png"):
        save(tmp_path / name, picture(20))
    save(tmp_path / "m1.png", np.pad(np.full((5, 5), 255, np.uint8), ((0, 15), (0, 15))))
    [problem] = inspect_dataset(path).problems
    assert (problem.kind, problem.name) == ("size mismatch", "i1.png")
    assert problem.detail == "20x20 pixels, i0.png of the same volume 16x16"


def test_millimetres_of_a_file_with_a_header(tmp_path: Path) -> None:
    """The table has precedence; a PNG states none."""
    nibabel = pytest.importorskip("nibabel")
    path = tmp_path / "slice.nii"
    image = nibabel.Nifti1Image(np.zeros((6, 4, 1), np.float32), np.diag([0.5, 1.25, 3.0, 1.0]))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)

    def record(file: Path, place: SlicePlace | None = None) -> Record:
        return Record(file, file, "x", "test", "c", "s", "", place)

    assert pixel_mm(record(path), (4, 6)) == pytest.approx((1.25, 0.5))
    assert pixel_mm(record(path, SlicePlace(modality="MR")), (4, 6)) == pytest.approx((1.25, 0.5))
    assert pixel_mm(record(path, SlicePlace(row_mm=2.0, column_mm=3.0)), (4, 6)) == (2.0, 3.0)
    assert pixel_mm(record(path), (6, 4)) is None
    assert pixel_mm(record(save(tmp_path / "a.png", picture())), (16, 16)) is None
