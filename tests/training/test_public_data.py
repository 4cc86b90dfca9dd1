"""A public data set in its own layout, from its folder to a trained bundle without a step between."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from test_pipeline import FAST, SIDE
from typer.testing import CliRunner

from ntpseg.cli import app
from ntpseg.utils.files import read_csv, read_jsonl


def write_biomedparse(root: Path) -> Path:
    """Discs, each with two sentences in train.json; the test split goes by its names."""
    y, x = np.mgrid[:SIDE, :SIDE]
    images, annotations = [], []
    for number in range(6):
        split = "train" if number < 4 else "test"
        disc = (y - 10 - number) ** 2 + (x - 16) ** 2 <= 36
        name = f"case_{number}_CT_liver"
        for folder, file, pixels in ((split, name, 40 + 160 * disc), (f"{split}_mask", f"{name}_tumor", 255 * disc)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(root / folder / f"{file}.png")
        if split == "train":
            images.append({"id": number, "file_name": f"{name}.png"})
            sentences = [{"raw": "tumor in liver CT"}, {"raw": "The hepatic lesion."}]
            annotations.append({"image_id": number, "mask_file": f"{name}_tumor.png", "sentences": sentences})
    (root / "train.json").write_text(json.dumps({"images": images, "annotations": annotations}), encoding="utf-8")
    return root


def test_biomedparse_is_trained_on_and_evaluated(tmp_path: Path) -> None:
    data, output = write_biomedparse(tmp_path / "MSD-Liver"), tmp_path / "run"
    options = [*FAST, "training.max_steps=2", "training.num_train_epochs=1"]
    result = CliRunner().invoke(app, ["train", "tiny", f"data.path={data}", f"output={output}", *options])
    assert result.exit_code == 0, result.output + repr(result.exception)
    # The run keeps digests of the sentences: two, each of all four masks.
    trained = read_jsonl(output / "data.jsonl")
    assert len({row["case"] for row in trained}) == 8 and len({row["text"] for row in trained}) == 2
    assert len({row["mask"] for row in trained}) == 4
    arguments = ["--model", str(output), "--data", str(data), "--split", "test", "--out", str(tmp_path / "report")]
    result = CliRunner().invoke(app, ["eval", *arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert {row["case"] for row in read_csv(tmp_path / "report" / "cases.csv")} == {
        "case_4_CT_liver_tumor",
        "case_5_CT_liver_tumor",
    }
