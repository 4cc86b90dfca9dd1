"""nnU-Net's layout, MONAI's data lists and folders: every slice's mask equals the labels, wherever they come from."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner
from volume_files import LABELS, SPACING, affine, image, labels, save_nifti

from ntpseg.cli import app
from ntpseg.data import MaskOptions, inspect_dataset, read_image, read_mask
from ntpseg.importers import IMPORTERS, ImportOptions, import_dataset
from ntpseg.utils.files import read_csv
from ntpseg.volumes import AXES
from ntpseg.volumes.volume import display

pytest.importorskip("nibabel")


def shown(values: np.ndarray) -> np.ndarray:
    """An array [I, J, K] of `affine` as LPS [D, H, W]: i runs to the left, j to the front, k to the head."""
    return values.transpose(2, 1, 0)[:, ::-1]


def nnunet(root: Path, cases: int = 3, **content) -> Path:
    for number in range(cases):
        values = labels(number)
        save_nifti(root / "labelsTr" / f"case_{number:03d}.nii.gz", values)
        save_nifti(root / "imagesTr" / f"case_{number:03d}_0000.nii.gz", image(values, number))
    about = {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": cases, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(about | content))
    return root


def rows_of(folder: Path) -> list[dict[str, str]]:
    return read_csv(folder / "manifest.csv")


@pytest.mark.parametrize("axis", AXES)
def test_every_mask_is_the_slice_of_the_labels(tmp_path, axis):
    import_dataset("nnunet", nnunet(tmp_path / "raw"), tmp_path / "out", ImportOptions(axis=axis, window="-100..200"))
    written = {(r["volume"], int(r["slice"]), r["structure"]): r for r in rows_of(tmp_path / "out")}
    expected = 0
    for number in range(3):
        name, values = f"case_{number:03d}", shown(labels(number))
        for index in range(values.shape[AXES.index(axis)]):
            flat = display(values, index, axis)
            for structure, value in LABELS.items():
                if value and (flat == value).sum() >= 4:
                    expected += 1
                    row = written[name, index, structure]
                    np.testing.assert_array_equal(read_mask(tmp_path / "out" / row["mask"]), flat == value)
                    pixels = read_image(tmp_path / "out" / row["image"]).astype(float)
                    hounsfield = display(shown(image(labels(number), number)), index, axis)
                    assert np.abs(pixels / 255 * 300 - 100 - hounsfield.clip(-100, 200)).max() <= 0.6
    assert len(written) == expected > 0
    row = next(iter(written.values()))
    sizes = {"axial": (2.5, 0.8, 0.7), "coronal": (0.8, 2.5, 0.7), "sagittal": (0.7, 2.5, 0.8)}[axis]
    assert tuple(float(row[name]) for name in ("slice_mm", "row_mm", "column_mm")) == pytest.approx(sizes)
    assert (row["axis"], row["modality"], row["subject"]) == (axis, "CT", row["volume"])
    assert not inspect_dataset(tmp_path / "out").problems


def test_empty_slices_have_rows_only_on_request(tmp_path):
    source = nnunet(tmp_path / "raw", 1)
    import_dataset("nnunet", source, tmp_path / "out", ImportOptions(negatives=1.0))
    rows = rows_of(tmp_path / "out")
    assert {row["slice"] for row in rows} == {"1", "2", "3", "4"}
    absent = [row for row in rows if row["mask"].endswith("empty.png")]
    assert len(absent) == 6 == sum(row["text"].startswith("No ") for row in rows)
    import_dataset("nnunet", source, tmp_path / "all", ImportOptions(empty_slices=True))
    rows = [row for row in rows_of(tmp_path / "all") if row["mask"].endswith("empty.png")]
    assert [row["slice"] for row in rows] == ["0", "5"]
    assert not inspect_dataset(tmp_path / "all", masks=MaskOptions(keep_empty=True)).problems


def relabelled(root: Path) -> Path:
    """The second case has its kidney under a value that nobody named; a third image has no labels."""
    source = nnunet(root, 2, labels={"background": 0, "liver": 1, "kidney_left": 2})
    values = labels(1)
    values[values == 2] = 7
    save_nifti(source / "labelsTr" / "case_001.nii.gz", values)
    save_nifti(source / "imagesTr" / "case_002_0000.nii.gz", image(labels(2)))
    return source


def test_what_no_label_names_is_told_and_never_taught_as_absent(tmp_path):
    source = relabelled(tmp_path / "raw")
    number = int((labels(1) == 2).sum())
    command = ["data", "import", "nnunet", str(source), str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert f"{number} pixels of value 7 in case_001 belong to no label" in done.stderr
    assert "1 image has no labels, and was left out: case_002" in done.stderr
    assert {row["volume"] for row in rows_of(tmp_path / "out")} == {"case_000", "case_001"}
    for options in (ImportOptions(negatives=1.0), ImportOptions(empty_slices=True)):
        with pytest.raises(ValueError, match=rf"labels of case_001 must all have a name .* got {number} pixels of val"):
            import_dataset("nnunet", source, tmp_path / "no", options)
    left = import_dataset("nnunet", source, tmp_path / "left", ImportOptions(negatives=1.0, skip_bad=True))
    assert left.cases == 1 and "case_001" in left.skipped[0] and not left.unnamed


def test_values_that_are_called_ignore_need_no_name(tmp_path):
    for folder, pixels in (("labels", labels()[..., 2]), ("images", labels()[..., 2] * 60)):
        (tmp_path / folder).mkdir()
        pixels = pixels.copy()
        pixels[0] = 255
        Image.fromarray(pixels).save(tmp_path / folder / "a.png")
    for number, (names, unnamed) in enumerate(
        (
            ({"liver": 1, "kidney_left": 2, "ignore": 255}, {}),
            ({"liver": 1, "border": [2, 255]}, {}),
            ({"liver": 1}, {2: {"a": int((labels()[..., 2] == 2).sum())}, 255: {"a": 18}}),
        )
    ):
        (tmp_path / "names.json").write_text(json.dumps(names))
        done = import_dataset("folders", tmp_path, tmp_path / f"out{number}")
        assert done.unnamed == unnamed and len(done.remarks()) == len(unnamed)


def test_patients_are_whole_in_a_split_and_labels_ts_is_the_test(tmp_path):
    source = nnunet(tmp_path / "raw", 6)
    save_nifti(source / "labelsTs" / "case_900.nii.gz", labels())
    save_nifti(source / "imagesTs" / "case_900_0000.nii.gz", image(labels()))
    save_nifti(source / "imagesTs" / "case_901_0000.nii.gz", image(labels()))
    import_dataset("nnunet", source, tmp_path / "out")
    splits: dict[str, set[str]] = {}
    for row in rows_of(tmp_path / "out"):
        splits.setdefault(row["split"], set()).add(row["subject"])
    assert splits["test"] == {"case_900"} and len(splits["train"] | splits["val"]) == 6 and splits["val"]
    assert not splits["train"] & splits["val"]


def test_version_1_and_regions_of_version_2(tmp_path):
    source = nnunet(tmp_path / "v1", 1, labels={"0": "background", "1": "liver", "2": "kidney_left"})
    about = json.loads((source / "dataset.json").read_text())
    del about["channel_names"], about["file_ending"]
    (source / "dataset.json").write_text(json.dumps(about | {"modality": {"0": "CT"}}))
    # The Decathlon's names have no channel.
    (source / "imagesTr" / "case_000_0000.nii.gz").rename(source / "imagesTr" / "case_000.nii.gz")
    import_dataset("nnunet", source, tmp_path / "a")
    assert {row["structure"] for row in rows_of(tmp_path / "a")} == {"liver", "kidney_left"}
    regions = {"background": 0, "whole": [1, 2], "kidney": 2, "ignore": 3}
    import_dataset("nnunet", nnunet(tmp_path / "v2", 1, labels=regions), tmp_path / "b")
    row = next(row for row in rows_of(tmp_path / "b") if row["structure"] == "whole" and row["slice"] == "2")
    np.testing.assert_array_equal(read_mask(tmp_path / "b" / row["mask"]), shown(labels())[2] > 0)
    assert {row["structure"] for row in rows_of(tmp_path / "b")} == {"whole", "kidney"}


def test_several_channels_are_chosen_or_composed(tmp_path):
    source = nnunet(tmp_path / "raw", 1, channel_names={"0": "T1", "1": "FLAIR"})
    save_nifti(source / "imagesTr" / "case_000_0001.nii.gz", image(labels(), 9))
    with pytest.raises(ValueError, match=r"--channels must choose .* there are 0 \(T1\), 1 \(FLAIR\)"):
        import_dataset("nnunet", source, tmp_path / "out")
    import_dataset("nnunet", source, tmp_path / "one", ImportOptions(channels=("flair",), window="-100..200"))
    import_dataset("nnunet", source, tmp_path / "two", ImportOptions(channels=("FLAIR", "0"), window="-100..200"))
    one, two = (read_image(tmp_path / name / "images" / "case_000" / "axial_0002.png") for name in ("one", "two"))
    np.testing.assert_array_equal(two[..., 0], one)
    assert not two[..., 2].any() and (two[..., 1] != one).any()
    assert rows_of(tmp_path / "one")[0]["modality"] == "MR"
    with pytest.raises(ValueError, match=r"--channels must be among 0 \(T1\), 1 \(FLAIR\), got 'T2'"):
        import_dataset("nnunet", source, tmp_path / "out", ImportOptions(channels=("T2",)))


def test_the_decathlon_keeps_channels_in_one_file(tmp_path):
    source = nnunet(tmp_path / "raw", 1, channel_names={"0": "T1", "1": "FLAIR"})
    (source / "imagesTr" / "case_000_0000.nii.gz").unlink()
    both = [image(labels(), seed) for seed in (0, 9)]
    save_nifti(source / "imagesTr" / "case_000.nii.gz", np.stack(both, -1))
    import_dataset("nnunet", source, tmp_path / "out", ImportOptions(channels=("FLAIR",), window="-100..200"))
    pixels = read_image(tmp_path / "out" / "images" / "case_000" / "axial_0002.png")
    assert np.abs(pixels / 255 * 300 - 100 - shown(both[1])[2].clip(-100, 200)).max() <= 0.6


def test_another_grid_is_an_error_and_resampled_on_request(tmp_path):
    source = nnunet(tmp_path / "raw", 1)
    matrix = affine()
    matrix[:3, :3] *= 2
    matrix[0, 3] -= SPACING[0] / 2
    save_nifti(source / "labelsTr" / "case_000.nii.gz", labels()[::2, ::2, ::2].copy(), matrix)
    with pytest.raises(ValueError, match=r"labels of case_000 .* got 10x9x3 voxels of 1.4x1.6x5 mm .* for 20x18x6"):
        import_dataset("nnunet", source, tmp_path / "out")
    import_dataset("nnunet", source, tmp_path / "out", ImportOptions(resample=True))
    row = next(r for r in rows_of(tmp_path / "out") if r["structure"] == "liver")
    assert read_mask(tmp_path / "out" / row["mask"]).shape == (18, 20)


def test_pictures_in_two_dimensions(tmp_path):
    values = labels()[..., 2]
    for folder, pixels in (("labelsTr/x.png", values), ("imagesTr/x_0000.png", (values * 60).astype(np.uint8))):
        (tmp_path / folder).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / folder)
    about = {"channel_names": {"0": "xray"}, "labels": LABELS, "file_ending": ".png"}
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    import_dataset("nnunet", tmp_path, tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert [row["structure"] for row in rows] == ["liver", "kidney_left"] and {r["volume"] for r in rows} == {""}
    np.testing.assert_array_equal(read_mask(tmp_path / "out" / rows[1]["mask"]), values == 2)


def test_monai_data_list(tmp_path):
    for number in range(4):
        save_nifti(tmp_path / "data" / f"img{number}.nii.gz", image(labels(number), number))
        save_nifti(tmp_path / "data" / f"lab{number}.nii.gz", labels(number))

    def entry(number: int, **more) -> dict:
        return {"image": f"data/img{number}.nii.gz", "label": f"data/lab{number}.nii.gz"} | more

    lists = {
        "training": [entry(0, patient="p0"), entry(1, patient="p1")],
        "validation": [entry(2, patient="p2")],
        "test": ["data/img3.nii.gz", entry(3, patient="p3")],
        "labels": {"0": "background", "1": "liver", "2": "kidney_left"},
    }
    (tmp_path / "list.json").write_text(json.dumps(lists))
    import_dataset("monai", tmp_path / "list.json", tmp_path / "out")
    found = {(row["subject"], row["split"]) for row in rows_of(tmp_path / "out")}
    assert found == {("p0", "train"), ("p1", "train"), ("p2", "val"), ("p3", "test")}
    folds = {"training": [entry(n, fold=n % 2) for n in range(4)], "labels": lists["labels"]}
    (tmp_path / "folds.json").write_text(json.dumps(folds))
    import_dataset("monai", tmp_path / "folds.json", tmp_path / "folds")
    assert {(r["volume"], r["split"]) for r in rows_of(tmp_path / "folds")} == {
        ("lab0", "val"), ("lab2", "val"), ("lab1", "train"), ("lab3", "train"),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"--channels must be among 0 \(0\), got 'T2'"):
        import_dataset("monai", tmp_path / "list.json", tmp_path / "no", ImportOptions(channels=("T2",)))
    lists["training"].append({"image": "data/img9.nii.gz"})
    (tmp_path / "list.json").write_text(json.dumps(lists))
    done = import_dataset("monai", tmp_path / "list.json", tmp_path / "some")
    assert done.cases == 4 and done.unlabelled == ["img9"]
    (tmp_path / "bad.json").write_text(json.dumps({"training": [entry(7)], "labels": LABELS}))
    with pytest.raises(ValueError, match=r"bad\.json must list files that are there, got data/img7"):
        import_dataset("monai", tmp_path / "bad.json", tmp_path / "bad")


def test_a_monai_list_of_a_folder_for_each_case(tmp_path):
    """Files of one name are different subjects; the modality may be one word."""
    for number in range(4):
        save_nifti(tmp_path / f"case{number}" / "image.nii.gz", image(labels(number), number))
        save_nifti(tmp_path / f"case{number}" / "label.nii.gz", labels(number))
    entries = [{"image": f"case{n}/image.nii.gz", "label": f"case{n}/label.nii.gz"} for n in range(4)]
    lists = {"training": entries[:3], "validation": entries[3:], "labels": {"1": "liver"}, "modality": "CT"}
    (tmp_path / "list.json").write_text(json.dumps(lists))
    import_dataset("monai", tmp_path / "list.json", tmp_path / "out")
    found = {(row["subject"], row["split"], row["modality"]) for row in rows_of(tmp_path / "out")}
    assert found == {(f"case{n}_label", "val" if n == 3 else "train", "CT") for n in range(4)}


def test_folders_with_a_file_of_names(tmp_path):
    for split, number in (("train", 0), ("test", 1)):
        save_nifti(tmp_path / "src" / split / "images" / f"p{number}_0000.nii.gz", image(labels(number)))
        save_nifti(tmp_path / "src" / split / "labels" / f"p{number}_seg.nii.gz", labels(number))
    with pytest.raises(ValueError, match="--names must be a file with the labels' names, got none"):
        import_dataset("folders", tmp_path / "src", tmp_path / "out")
    (tmp_path / "src" / "names.csv").write_text("value,name,side,organ\n1,hepar,,liver\n2,ren,left,kidney\n")
    (tmp_path / "t.yaml").write_text("templates: ['The {side} {organ}.']")
    import_dataset("folders", tmp_path / "src", tmp_path / "out", ImportOptions(templates=tmp_path / "t.yaml"))
    rows = rows_of(tmp_path / "out")
    assert {row["text"] for row in rows} == {"The liver.", "The left kidney."}
    assert {(row["volume"], row["split"]) for row in rows} == {("p0", "train"), ("p1", "test")}
    (tmp_path / "src" / "test" / "labels" / "p1_seg.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"labels must have a file for every case, got none for p1"):
        import_dataset("folders", tmp_path / "src", tmp_path / "again")


def test_a_folder_for_each_structure(tmp_path):
    for number in range(2):
        folder = tmp_path / "src" / f"s{number}"
        save_nifti(folder / "ct.nii.gz", image(labels(number)))
        for name in ("liver", "kidney_left", "tumor"):
            save_nifti(folder / "segmentations" / f"{name}.nii.gz", (labels(number) == LABELS[name]).astype(np.uint8))
    both = (labels(0) > 0).astype(np.uint8)  # lies on the others
    save_nifti(tmp_path / "src" / "s0" / "segmentations" / "abdomen.nii.gz", both)
    (tmp_path / "src" / "meta.csv").write_text("image_id;age;split\ns0;50;train\ns1;60;val\n")
    save_nifti(tmp_path / "src" / "s2" / "ct.nii.gz", image(labels()))
    done = import_dataset("totalsegmentator", tmp_path / "src", tmp_path / "out", ImportOptions(negatives=0.2))
    assert done.cases == 2 and done.unlabelled == ["s2"]
    rows = rows_of(tmp_path / "out")
    assert {(row["volume"], row["split"], row["modality"]) for row in rows} == {
        ("s0", "train", "CT"),
        ("s1", "val", "CT"),
    }
    for name, wanted in (("abdomen", labels() > 0), ("kidney_left", labels() == 2)):
        row = next(r for r in rows if (r["structure"], r["volume"], r["slice"]) == (name, "s0", "2"))
        np.testing.assert_array_equal(read_mask(tmp_path / "out" / row["mask"]), shown(wanted)[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "dataset.json").unlink(), r"source must be a folder with nnU-Net's dataset.json, got"),
        (lambda root: (root / "dataset.json").write_text("{"), r"dataset.json must be a readable YAML or JSON file"),
        (lambda root: (root / "dataset.json").write_text("{}"), r"dataset.json must have labels"),
        (
            lambda root: (root / "imagesTr" / "case_000_0000.nii.gz").unlink(),
            r"label map .*case_000.* must have its image",
        ),
        (lambda root: (root / "labelsTr" / "case_000.nii.gz").unlink(), r"must lie beside labelsTr"),
    ],
)
def test_a_source_that_is_incomplete_is_one_line_on_the_command_line(tmp_path, change, message):
    source = nnunet(tmp_path / "raw", 1)
    change(source)
    with pytest.raises(ValueError, match=message) as caught:
        import_dataset("nnunet", source, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_the_command(tmp_path):
    source = nnunet(tmp_path / "raw", 2)
    command = ["data", "import", "nnunet", str(source), str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, "--axis", "coronal", "--negatives", "0.5"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "2 cases" in done.output and "hold no finding" in done.output
    again = CliRunner().invoke(app, command)
    assert isinstance(again.exception, ValueError) and "out must be a new or an empty" in str(again.exception)
    wrong = CliRunner().invoke(app, [*command, "--splits", "8:2"])
    assert "--splits must be three numbers such as 0.7:0.15:0.15, got '8:2'" in str(wrong.exception)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("nnunet", {"names": Path("foo.csv")}, r"--names must be given for a kind .*\(monai, folders\), got foo.csv"),
        ("coco", {"axis": "coronal"}, "--axis must be given for a kind that reads it .* got coronal for coco; leave"),
        ("coco", {"window": "lung"}, "--window must be given for a kind"),
        ("coco", {"channels": ("3",)}, r"--channels must be given for a kind that reads it \(nnunet, monai\), got 3"),
        ("coco", {"resample": True}, "--resample must be given for a kind"),
        ("ms-cxr", {"min_area_mm2": 1000.0}, "--min-area-mm2 must be given for a kind"),
        ("rtstruct", {"resample": True}, "--resample must be given for a kind"),
    ],
)
def test_an_option_that_a_kind_does_not_read_is_refused(tmp_path, kind, options, message):
    with pytest.raises(ValueError, match=message):
        import_dataset(kind, nnunet(tmp_path / "raw", 1), tmp_path / "out", ImportOptions(**options))
    assert not (tmp_path / "out").exists()


def test_the_table_of_options_that_kinds_read_is_whole():
    """An importer reads from its options nothing but what it declares."""
    for importer in IMPORTERS.values():
        module = Path(importlib.import_module(importer.module).__file__).read_text()
        for name in ("names", "channels", "resample"):
            assert (f"options.{name}" in module) == (name in importer.reads), (importer.name, name)
