"""What `make` would run, and what a container image would take, told without running either."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def commands(*arguments: str) -> str:
    made = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return made.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_a_folder_may_have_a_space_and_leaves_the_demos_model() -> None:
    own = commands("demo", "DATA=/a b/set", "OUT=/c d")
    assert 'train demo "data.path=/a b/set" "output=/c d/own" --overwrite' in own
    assert 'eval --model "/c d/own"' in own and 'report "/c d/own"' in own
    assert '"output=demo/run" --overwrite' in commands("demo")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_weights_train_only_what_is_not_there() -> None:
    made = commands("weights", "CXR=/a b")
    assert re.search(r'test -d "demo/run/model" \|\| .*make.* demo DATA=', made)
    assert 'test -d "demo/xray/model" || .venv/bin/ntpseg train xray "data.path=/a b"' in made


def test_an_image_takes_nothing_that_git_ignores() -> None:
    """Of the entries that hold for every folder Git's form is Docker's with ``**/`` before it."""
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    left_out = set((ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines())
    expected = {line.strip("/") if line.startswith("/") else f"**/{line.rstrip('/')}" for line in ignored}
    assert expected | {".git"} <= left_out
