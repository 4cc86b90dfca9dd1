"""What an import writes: rows, names, splits, negatives, all or nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ntpseg.data import MaskOptions, inspect_dataset, read_image, read_mask
from ntpseg.importers import ImportOptions
from ntpseg.importers.base import Case, Sample, Structure
from ntpseg.importers.writing import COLUMNS, distinct_names, write_dataset
from ntpseg.utils.files import read_csv

STRUCTURES = tuple(Structure(name, ((0, value),)) for value, name in enumerate(("liver", "kidney_left", "cyst"), 1))


def labels() -> np.ndarray:
    """Liver and left kidney, no cyst."""
    values = np.zeros((24, 32), np.uint8)
    values[2:10, 3:20] = 1
    values[12:20, 5:12] = 2
    return values


def case(name: str = "a", split: str = "", subject: str = "", **changes) -> Case:
    values = labels()
    pixels = np.random.default_rng(0).integers(0, 255, values.shape, np.uint8)
    sample = Sample(**({"image": pixels, "labels": (values,), "structures": STRUCTURES} | changes))
    return Case(name, subject or name, lambda: sample, split)


def rows_of(folder: Path) -> list[dict[str, str]]:
    return read_csv(folder / "manifest.csv")


def test_a_picture_becomes_one_image_a_mask_each_and_a_row_for_each_sentence(tmp_path):
    done = write_dataset([case(spacing=(0.5, 0.25), modality="US")], tmp_path / "out", ImportOptions())
    rows = rows_of(tmp_path / "out")
    assert list(rows[0]) == list(COLUMNS)
    assert [(row["text"], row["structure"]) for row in rows] == [
        ("The liver.", "liver"),
        ("The left kidney.", "kidney_left"),
    ]
    assert {row["image"] for row in rows} == {"images/a.png"} and done.images == 1 and done.masks == 2
    assert {(r["row_mm"], r["column_mm"], r["modality"], r["volume"], r["axis"], r["slice"]) for r in rows} == {
        ("0.5", "0.25", "US", "", "", "")
    }
    np.testing.assert_array_equal(read_image(tmp_path / "out" / "images" / "a.png"), case().load().image)
    for value, row in enumerate(rows, start=1):
        np.testing.assert_array_equal(read_mask(tmp_path / "out" / row["mask"]), labels() == value)
    assert not inspect_dataset(tmp_path / "out").problems


def test_every_sentence_of_the_source_is_kept_with_one_image_and_one_mask(tmp_path):
    own = (Structure("spot", ((0, 1),), ("The bright spot.", "=cmd, the upper one.")),)
    write_dataset([case(structures=own)], tmp_path / "out", ImportOptions())
    checked = inspect_dataset(tmp_path / "out")
    assert [record.text for record in checked.records] == ["The bright spot.", "=cmd, the upper one."]
    assert len({record.case for record in checked.records}) == 2 and not checked.problems
    assert len({(record.image, record.mask) for record in checked.records}) == 1


def test_negatives_are_absent_structures_with_an_empty_mask(tmp_path):
    write_dataset([case()], tmp_path / "out", ImportOptions(negatives=0.5))
    negative = [row for row in rows_of(tmp_path / "out") if row["structure"] == "cyst"]
    assert [row["text"] for row in negative] == ["No cyst."]
    assert not read_mask(tmp_path / "out" / negative[0]["mask"]).any()
    checked = inspect_dataset(tmp_path / "out", masks=MaskOptions(keep_empty=True))
    assert checked.negatives == 1 and not checked.problems


def test_an_image_that_shows_nothing_has_negatives_only_on_request(tmp_path):
    empty = case("healthy", labels=(np.zeros((24, 32), np.uint8),))
    write_dataset([case(), empty], tmp_path / "without", ImportOptions())
    assert {row["image"] for row in rows_of(tmp_path / "without")} == {"images/a.png"}
    for number, options in enumerate((ImportOptions(negatives=1.0), ImportOptions(empty_slices=True))):
        write_dataset([empty], tmp_path / str(number), options)
        assert [row["text"][:3] for row in rows_of(tmp_path / str(number))] == ["No "]


def test_negatives_are_a_share_of_many_images(tmp_path):
    cases = [case(f"c{number}") for number in range(60)]
    done = write_dataset(cases, tmp_path / "out", ImportOptions(negatives=0.125))
    assert 5 <= done.negatives <= 28  # 2 rows with a finding in each: 15 expected


def test_too_few_pixels_are_neither_a_finding_nor_a_negative(tmp_path):
    values = labels()
    values[0, :3] = 3
    done = write_dataset([case(labels=(values,))], tmp_path / "out", ImportOptions(negatives=5))
    assert {row["structure"] for row in rows_of(tmp_path / "out")} == {"liver", "kidney_left"} and done.small == 1


def test_area_in_millimetres(tmp_path):
    options = ImportOptions(min_area_mm2=10.0)  # 80 pixels of 0.125 mm2: the kidney has 56, the liver 136
    write_dataset([case(spacing=(0.5, 0.25))], tmp_path / "out", options)
    assert [row["structure"] for row in rows_of(tmp_path / "out")] == ["liver"]


def test_a_limit_of_size_shrinks_image_and_masks_and_tells_the_spacing(tmp_path):
    write_dataset([case(spacing=(0.5, 0.5))], tmp_path / "out", ImportOptions(size=16))
    row = rows_of(tmp_path / "out")[0]
    assert read_image(tmp_path / "out" / row["image"]).shape == (12, 16)
    mask = read_mask(tmp_path / "out" / row["mask"])
    assert mask.shape == (12, 16) and abs(int(mask.sum()) * 4 - 136) <= 16
    assert (row["row_mm"], row["column_mm"]) == ("1", "1")


def test_same_seed_same_data_and_whole_subjects_in_a_split(tmp_path):
    cases = [case(f"p{number // 2}_{number}", subject=f"p{number // 2}") for number in range(20)]
    for name in ("one", "two"):
        write_dataset(cases, tmp_path / name, ImportOptions(seed=3))
    tables = [(tmp_path / name / "manifest.csv").read_bytes() for name in ("one", "two")]
    assert tables[0] == tables[1]
    splits: dict[str, set[str]] = {}
    for row in rows_of(tmp_path / "one"):
        splits.setdefault(row["subject"], set()).add(row["split"])
    assert all(len(held) == 1 for held in splits.values())
    assert set.union(*splits.values()) == {"train", "val", "test"}


def test_a_test_set_of_the_source_stays_what_it_is(tmp_path):
    cases = [case(f"t{n}", "test") for n in range(3)] + [case(f"f{n}") for n in range(10)]
    write_dataset(cases, tmp_path / "out", ImportOptions())
    assert {row["subject"] for row in rows_of(tmp_path / "out") if row["split"] == "test"} == {"t0", "t1", "t2"}
    with pytest.raises(ValueError, match="a subject must be in one split, got 'p' in train and in test"):
        write_dataset([case("a", "train", "p"), case("b", "test", "p")], tmp_path / "leak", ImportOptions())
    with pytest.raises(ValueError, match=r"got 'p' in test and among the cases to be dealt out \(a\); rename one"):
        write_dataset([case("a", "", "p"), case("b", "test", "p")], tmp_path / "leak", ImportOptions())


def test_out_may_be_a_link_and_no_mount(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_dataset([case()], tmp_path / "link", ImportOptions())
    assert (tmp_path / "link").is_symlink() and rows_of(tmp_path / "real")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_dataset([case()], Path(), ImportOptions())
    assert rows_of(tmp_path / "here")
    (tmp_path / "mount").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "mount")
    with pytest.raises(ValueError, match=r"out must not be a mounted folder itself, got .*mount; give the name of one"):
        write_dataset([case()], tmp_path / "mount", ImportOptions())


def test_all_or_nothing(tmp_path):
    def broken() -> Sample:
        raise ValueError("b.nii.gz must be readable, got damage")

    cases = [case(), Case("b", "b", broken)]
    with pytest.raises(ValueError, match=r"b\.nii\.gz"):
        write_dataset(cases, tmp_path / "out", ImportOptions())
    assert list(tmp_path.iterdir()) == []
    done = write_dataset(cases, tmp_path / "out", ImportOptions(skip_bad=True))
    assert done.cases == 1 and done.skipped == ["b: b.nii.gz must be readable, got damage"]
    with pytest.raises(ValueError, match="out must be a new or an empty folder"):
        write_dataset(cases, tmp_path / "out", ImportOptions())
    with pytest.raises(ValueError, match="got none; the first: b: "):
        write_dataset(cases[1:], tmp_path / "none", ImportOptions(skip_bad=True))


def test_one_case_is_in_memory_at_a_time(tmp_path):
    import weakref

    alive: list[weakref.ref] = []

    def load() -> Sample:
        assert sum(one() is not None for one in alive) <= 1  # the one before may go as this one comes
        sample = case().load()
        values = labels()
        alive.append(weakref.ref(values))
        return Sample(sample.image, (values,), STRUCTURES)

    write_dataset([Case(str(n), str(n), load) for n in range(4)], tmp_path / "out", ImportOptions())
    assert len(alive) == 4


def test_sizes_of_image_and_labels_must_agree(tmp_path):
    with pytest.raises(ValueError, match="a: labels must have their image's size, got 32x20 for 32x24"):
        write_dataset([case(labels=(labels()[:20],))], tmp_path / "out", ImportOptions())


def test_names_of_files_are_safe_and_distinct():
    assert distinct_names(["a/b", "A:B", "../x", "Leber (links)", "..."]) == [
        "a-b", "A-B-2", "x", "Leber-links", "unnamed",
    ]  # fmt: skip
    assert len(set(map(str.lower, distinct_names(["x" * 300, "x" * 301])))) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axis": "oblique"}, "axis must be one of axial"),
        ({"splits": (0.5, 0.5, 0.5)}, "splits must be three fractions of sum 1 .* got 0.5:0.5:0.5"),
        ({"min_pixels": 3}, "min_pixels must be an integer >= 4"),
        ({"size": 8}, "size must be 0 or at least 16"),
        ({"negatives": float("nan")}, "negatives must be a number"),
    ],
)
def test_options_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        ImportOptions(**changes)
