"""No folder that is given as a model or tokenizer runs code of its own."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_segmenter import shared

import ntpseg
from ntpseg.utils.manifest import write_manifest

PACKAGE = Path(ntpseg.__file__).parent
# Classes of this package, which read a directory by themselves and load Hugging Face's parts as tested here.
OWN = {"Bundle", "Segmenter", "CompactVQ", "Emu3Vision"}
LOADERS = {"from_pretrained", "from_config"}
# Fields in which Hugging Face looks for a class in a Python file of the folder.
AUTO_MAP = {
    "auto_map": {
        **dict.fromkeys(("AutoConfig", "AutoModel", "AutoBackbone", "AutoModelForCausalLM"), "planted.Planted"),
        "AutoTokenizer": ["planted.Planted", "planted.Planted"],
    }
}


def loads(source: str) -> list[ast.Call]:
    """Calls that load with Hugging Face."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    found = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in LOADERS]
    return [c for c in found if not (isinstance(c.func.value, ast.Name) and c.func.value.id in OWN)]  # type: ignore[attr-defined]


def refuses_code(call: ast.Call) -> bool:
    """Whether a call passes ``trust_remote_code=False`` in so many words."""
    values = [k.value for k in call.keywords if k.arg == "trust_remote_code"]
    return len(values) == 1 and isinstance(values[0], ast.Constant) and values[0].value is False


def test_every_load_of_the_package_refuses_code() -> None:
    found = [(path, call) for path in PACKAGE.rglob("*.py") for call in loads(path.read_text(encoding="utf-8"))]
    assert len(found) >= 5, "the calls are looked for in the wrong place"
    assert not [f"{path.name}:{call.lineno}" for path, call in found if not refuses_code(call)]
    for bad in ("AutoTokenizer.from_pretrained(x)", "AutoConfig.from_pretrained(x, trust_remote_code=t)"):
        assert [refuses_code(call) for call in loads(bad)] == [False]


@pytest.fixture
def planted(tmp_path: Path) -> tuple[Path, Path]:
    """A run whose folders all hold a module that leaves a mark when it is imported; and the mark."""
    run, mark = tmp_path / "run", tmp_path / "executed"
    shutil.copytree(shared()[2], run)
    for folder in (run / "model", run / "model" / "text", run / "model" / "vision"):
        (folder / "planted.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Planted: pass\n")
        for name in ("config.json", "tokenizer_config.json"):
            file = folder / name
            if file.is_file():
                file.write_text(json.dumps({**json.loads(file.read_text()), **AUTO_MAP}))
    # With no class that transformers knows, the planted one is all that could be loaded.
    settings = run / "model" / "text" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "tokenizer_class": "Planted"}))
    # Who plants a module can write the hashes anew, too.
    write_manifest(run / "model")
    return run, mark


def test_a_planted_class_never_runs_also_with_yes_on_standard_input(planted: tuple[Path, Path], tmp_path: Path) -> None:
    run, mark = planted
    image = shared()[0][0].image
    arguments = ["--model", run, "--image", image, "--text", "The left square.", "--out", tmp_path / "mask.png"]
    done = subprocess.run(
        [sys.executable, "-m", "ntpseg.cli", "predict", *map(str, arguments)],
        input="yes\n" * 100,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert not mark.exists() and not (tmp_path / "modules").exists()
    assert "Traceback" not in done.stderr
    if done.returncode:
        assert "text" in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize("kind", ["text", "model", "vision", "backbone", "emu3"])
def test_a_planted_class_never_runs_by_the_functions(
    planted: tuple[Path, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ntpseg.models import Bundle
    from ntpseg.models.pretrained_encoder import load_encoder
    from ntpseg.tokenizers.auto import load_vision_tokenizer
    from ntpseg.tokenizers.text import load_text_tokenizer

    monkeypatch.setattr("builtins.input", lambda *arguments: "yes")
    run, mark = planted
    model = run / "model"
    if kind == "emu3":
        (model / "vision" / "config.json").write_text(json.dumps({"model_type": "emu3_vqgan", **AUTO_MAP}))
    load = {
        "text": lambda: load_text_tokenizer(model / "text"),
        "model": lambda: Bundle.from_pretrained(model),
        "vision": lambda: load_vision_tokenizer(model / "vision"),
        "emu3": lambda: load_vision_tokenizer(model / "vision", image_size=32),
        "backbone": lambda: load_encoder(
            "huggingface", {"model_type": "resnet", "name_or_path": str(model), **AUTO_MAP}
        ),
    }[kind]
    try:
        load()
    except ValueError as error:
        assert "\n" not in str(error)
    assert not mark.exists()
