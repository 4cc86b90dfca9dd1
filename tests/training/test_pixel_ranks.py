"""A model that reads pixels trains on two ranks under ZeRO-3 as it does in one process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_segmenter import write_dataset, write_manifest
from typer.testing import CliRunner

from ntpseg.cli import app
from ntpseg.evaluation.run_directory import training_log
from ntpseg.generation import Segmenter

ROOT = Path(__file__).parents[2]
NAMES = ("loss", "ntp", "dice", "pixel", "grad_norm")
SETTINGS = (
    "data.size=32",
    "data.augment.flip=0.5",
    "vision.mask_codes=16",
    "model.stem.widths=[8,16,16]",
    "model.stem.group_size=8",
    # Drafts and blanks are drawn on each rank by itself.
    "model.mask_inputs=null",
    "optimizer.name=adamw",
    "optimizer.ema=0",
    "training.max_steps=4",
    "training.logging_steps=1",
    "training.bf16=false",
    "max_minutes=null",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]


def test_two_ranks_of_zero3_equal_one_process(tmp_path: Path) -> None:
    records = [r for r in write_dataset(tmp_path / "data", 24) if "Nothing" not in r.text]
    write_manifest(tmp_path / "data.csv", records)
    common = ["train", "qata", f"data.path={tmp_path / 'data.csv'}", *SETTINGS]
    single = [f"output={tmp_path / 'one'}", "training.per_device_train_batch_size=4"]
    done = CliRunner().invoke(app, [*common, *single])
    assert done.exit_code == 0, done.output + repr(done.exception)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "ntpseg.cli", *common, f"output={tmp_path / 'zero3'}"]
    command += ["training.per_device_train_batch_size=2", "--deepspeed", "zero3"]
    ranks = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert ranks.returncode == 0, ranks.stderr[-4000:]
    one, two = (np.array([[row[n] for n in NAMES] for row in steps(tmp_path / name)]) for name in ("one", "zero3"))
    assert one.shape == (4, len(NAMES)) and (one > 0).all()
    np.testing.assert_allclose(two, one, rtol=1e-3, atol=1e-5)
    prediction = Segmenter.from_pretrained(tmp_path / "zero3").segment(str(records[0].image), records[0].text)
    assert np.isfinite(prediction.probability).all()


def steps(run: Path) -> list[dict]:
    return [row for row in training_log(run) if "dice" in row]
