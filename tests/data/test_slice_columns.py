"""The manifest's columns about slices of volumes."""

from __future__ import annotations

from pathlib import Path

import pytest
from dataset_files import picture, save, square, table

from ntpseg.data import SlicePlace, load_records
from ntpseg.data.layouts.manifest import read_manifest

PLACE = {"volume": "v1", "axis": "axial", "slice_mm": "2.5", "row_mm": "0.8", "column_mm": "0.7"}
PLACE |= {"window": "lung", "modality": "CT", "structure": "liver"}


def manifest(root: Path, rows: list[dict[str, str]]) -> Path:
    """Write a manifest whose rows have an image and a mask of their own and a sentence, where they name none."""
    full = []
    for number, row in enumerate(rows):
        save(root / f"i{number}.png", picture(seed=number))
        save(root / f"m{number}.png", square())
        full.append({"image": f"i{number}.png", "mask": f"m{number}.png", "text": "The liver.", "split": "train"} | row)
    names = list(dict.fromkeys(name for row in full for name in row))
    return table(root / "manifest.csv", [{name: row.get(name, "") for name in names} for row in full])


def test_columns_become_the_place_of_a_record(tmp_path: Path) -> None:
    rows = [
        PLACE | {"slice": "0"},
        PLACE | {"slice": "1.0", "axis": "Axial"},
        {"row_mm": "0.1", "column_mm": "0.2"},
        {},
    ]
    places = [record.place for record in load_records(manifest(tmp_path, rows))]
    expected = SlicePlace("v1", "axial", 0, 2.5, 0.8, 0.7, "lung", "CT", "liver")
    assert places[0] == expected and expected.voxel_mm == (2.5, 0.8, 0.7)
    assert places[1] is not None and places[1].index == 1
    assert places[2] == SlicePlace(row_mm=0.1, column_mm=0.2) and places[2].pixel_mm == (0.1, 0.2)
    assert places[2].voxel_mm is None
    assert places[3] is None


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"axis": ""}, "axis must be one of axial, coronal, sagittal, got ''"),
        ({"axis": "oblique"}, "axis must be one of axial, coronal, sagittal, got 'oblique'"),
        ({"slice": ""}, "slice must be an integer >= 0 in a row with a volume, got ''"),
        ({"slice": "1.5"}, "slice must be an integer >= 0 in a row with a volume, got '1.5'"),
        ({"slice": "-1"}, "slice must be an integer >= 0, got -1"),
        ({"row_mm": "wide"}, "row_mm must be a number > 0, got 'wide'"),
        ({"slice_mm": "0"}, "slice_mm must be a number > 0, got 0.0"),
        ({"column_mm": "nan"}, "column_mm must be a number > 0, got nan"),
        ({"axis": "coronal"}, "axis must be the same in all rows of volume 'v1', got axial, coronal in rows 2 and 3"),
        ({"row_mm": "0.9"}, "row_mm must be the same in all rows of volume 'v1', got 0.8, 0.9 in rows 2 and 3"),
        ({"slice_mm": ""}, "slice_mm must be the same in all rows of volume 'v1', got 2.5, nothing in rows 2 and 3"),
        ({"slice": "0"}, "row 2 has slice 0 of volume 'v1' with this sentence too; the first counts"),
        ({"subject": "p2"}, "its volume is another subject's in row 2; a volume has one subject"),
    ],
)
def test_a_bad_row_is_one_problem(tmp_path: Path, cells: dict[str, str], message: str) -> None:
    first = PLACE | {"slice": "0", "subject": "p1"}
    path = manifest(tmp_path, [first, first | {"slice": "1"} | cells, first | {"slice": "2"}])
    listing = read_manifest(path)
    assert [problem.detail for problem in listing.problems] == [message]
    assert [record.place.index for record in listing.records if record.place] == [0, 2]


def test_a_slice_may_have_several_structures_and_sentences(tmp_path: Path) -> None:
    first = PLACE | {"slice": "3"}
    rows = [first, first | {"structure": "spleen"}, first | {"text": "The large organ."}]
    assert len(load_records(manifest(tmp_path, rows))) == 3


def test_columns_of_these_names_without_a_volume_are_not_read(tmp_path: Path) -> None:
    [record] = load_records(manifest(tmp_path, [{"axis": "x-axis", "slice": "top", "modality": "MR"}]))
    assert record.place == SlicePlace(modality="MR")


def test_the_slices_of_a_volume_share_their_subject(tmp_path: Path) -> None:
    """Without a column of subjects, and without one of splits."""
    rows = [PLACE | {"volume": f"v{n // 4}", "slice": str(n % 4), "split": ""} for n in range(40)]
    path = manifest(tmp_path, rows)
    path.write_text("\n".join(line.replace("split", "fold_of_mine", 1) for line in path.read_text().splitlines()))
    splits: dict[str, set[str]] = {}
    for record in load_records(path):
        assert record.place is not None and record.subject == record.place.volume
        splits.setdefault(record.subject, set()).add(record.split)
    assert len(splits) == 10 and all(len(found) == 1 for found in splits.values())


def test_bids_names_of_volumes_give_the_patient(tmp_path: Path) -> None:
    rows = [PLACE | {"volume": f"sub-01_ses-{n}_ct", "slice": "0"} for n in (1, 2)]
    assert {record.subject for record in load_records(manifest(tmp_path, rows))} == {"sub-01"}
