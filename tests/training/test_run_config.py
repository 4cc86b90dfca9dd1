from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ntpseg.training.arguments import training_arguments
from ntpseg.training.config import CONFIGS, check_same_run, config_names, dump_config, load_config
from ntpseg.training.distributed import ZERO_STAGES, deepspeed_config
from ntpseg.training.hardware import resolve_bf16


@pytest.mark.parametrize("name", config_names())
def test_ready_configurations_load(name, tmp_path) -> None:
    config = load_config(name)
    assert config.output is None
    training_arguments(load_config(name, ["training.eval_strategy=no"]), tmp_path)


def test_overrides_and_round_trip(tmp_path) -> None:
    config = load_config("tiny", ["model.k=1", "training.max_steps=7", "vision.path=there", "loss.negatives=0"])
    assert (config.model.k, config.training["max_steps"], config.loss.negatives) == (1, 7, 0)
    assert config.vision["path"] == "there"
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path) == config
    check_same_run(config, tmp_path / "config.yaml")
    longer = load_config(tmp_path, ["training.max_steps=9", "output=elsewhere"])
    check_same_run(longer, tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"resume must .* got model.k \(1 -> 2\)"):
        check_same_run(load_config(tmp_path, ["model.k=2"]), tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        ("nothing-here", [], "configuration must be .* got 'nothing-here'"),
        ("tiny", ["model.heads=3"], "heads"),
        ("tiny", ["model.k=many"], "many"),
        ("tiny", ["model.k"], "overrides must have the form .* got 'model.k'"),
        ("tiny", ["model.k=0"], "model.k must be an integer >= 1, got 0"),
        ("tiny", ["loss.negatives=-1"], "loss.negatives must be an integer >= 0, got -1"),
        ("tiny", ["data.channels=2"], "data.channels must be one of 1, 3, got 2"),
        ("tiny", ["training.epochs=3"], "training must hold fields of transformers.TrainingArguments, got 'epochs'"),
        ("tiny", ["training.output_dir=x"], "training.output_dir must not be set .use output., got 'x'"),
    ],
)
def test_errors(source, overrides, message) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(source, overrides)


def test_arguments(tmp_path) -> None:
    config = load_config("tiny", ["training.bf16=false", "training.learning_rate=5e-4", "seed=3"])
    args = training_arguments(config, tmp_path)
    assert (args.learning_rate, args.seed, args.bf16) == (5e-4, 3, False)
    assert args.get_warmup_steps(200) == 10, "warmup is a fraction of all steps"
    with pytest.raises(ValueError, match="training must be fields that TrainingArguments accepts, got: "):
        training_arguments(load_config("tiny", ["training.lr_scheduler_type=zigzag"]), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must hold at least one key, got none"),
        (b"- a\n- b\n", "must be a mapping of keys to values, got a list"),
        (b"model: {k: 1", "must be valid YAML, got .*: .* in line 2, column"),
        (b"seed: 1\nseed: 2\n", "found duplicate key seed in line 2"),
        (b"model:\n\tk: 1\n", "must be valid YAML"),
        (b"model: {preset: \xff\xfe}", r"must be UTF-8 text, got .*c\.yaml"),
        (b"\x00\x01\x02", "must be valid YAML"),
        (b"text: hello", "must have known keys and valid values"),
        (b"a: &a [1]\nb: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        (b"training: " + b"[" * 3000, "must be valid YAML.*nest"),
        (b"x: 1\n" * 100_000, "must have at most 200000 bytes"),
        (b"seed: ${nowhere}", "'nowhere' not found"),
        (b"seed: ${data.size}\ndata: {size: '${seed}'}", "Recursive interpolation"),
        (b"data: {augment: '${vision}'}", "must refer to single values"),
        (b"data: {path: '" + b"${seed}" * 21 + b"'}", "at most 20, got 21"),
    ],
)
def test_malformed_files_are_one_line(content, message, tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_an_alias_bomb_is_refused_at_once(tmp_path) -> None:
    path = tmp_path / "c.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="must be valid YAML"):
        load_config(path)
    with pytest.raises(ValueError, match="must have values that are valid YAML"):
        load_config("tiny", [f"vision={{{', '.join(lines)}}}"])


@pytest.mark.parametrize(
    "override", ["=", "a", "=1", "a.b=", "a..b=1", ".a=1", "a.=1", "a[0]=1", "a[=1", "model.k={", "model.k=[", "a b=1"]
)
def test_malformed_overrides_are_one_line(override) -> None:
    with pytest.raises(ValueError, match=r"^overrides must have ") as caught:
        load_config("tiny", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "data.size=0",
        "data.size=100",
        "data.size=1000000",
        "data.layout=none",
        "data.augment={flip: 2}",
        "data.augment={turn: 2}",
        "data.variants=-1",
        "text.vocab_size=256",
        "vision.factor=5",
        "vision.steps=-1",
        "vision.dim=wide",
        "vision.codes=7",
        "vision.path=7",
        "model.preset=huge",
        "model.k=100000",
        "model.stem={widths: [37]}",
        "model.stem={widths: 5}",
        "model.overrides.hidden_size=-1",
        "model.overrides.num_key_value_heads=3",
        "model.encoder_weights=x",
        "loss.tcl_weight=nan",
        "loss.temperature=0",
        "loss.head_weights=[1, 1]",
        "loss.head_weights=[0, 0, 0, 0]",
        "loss.dice=-1",
        "loss.soft_temperature=.inf",
        "optimizer.muon_learning_rate=nan",
        "optimizer.ema=1",
        "seed=-1",
        "seed=4294967296",
        "max_minutes=.nan",
        "max_minutes=-1",
        "clock=sun",
        "layout=left",
    ],
)
def test_values_out_of_range_name_their_key(override) -> None:
    section = override.split("=")[0].split(".")[0]
    with pytest.raises(ValueError, match=rf"^{section}[\w.]* must (be|have|hold) .*, got ") as caught:
        load_config("tiny", [override])
    assert "\n" not in str(caught.value)


def test_paths_are_saved_absolute(tmp_path, monkeypatch) -> None:
    (tmp_path / "vq").mkdir()
    monkeypatch.chdir(tmp_path)
    config = load_config("tiny", ["data.path=data", "data.cache=tokens", "vision.path=vq", "text.path=nowhere"])
    saved = tmp_path / "run" / "config.yaml"
    saved.parent.mkdir()
    saved.write_text(dump_config(config))
    monkeypatch.chdir("/")
    again = load_config(saved)
    assert again.data.path == str(tmp_path / "data") and again.data.cache == str(tmp_path / "tokens")
    assert again.vision["path"] == str(tmp_path / "vq") and again.text.path == "nowhere"
    monkeypatch.chdir(tmp_path)
    check_same_run(config, saved)


def test_the_environment_is_used_but_not_saved_or_shown(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NTPSEG_PLACE", "/secret/place")
    path = tmp_path / "c.yaml"
    path.write_text("data: {path: '${oc.env:NTPSEG_PLACE}', cache: '${data.path}/cache'}\noutput: r\nseed: 3\n")
    config = load_config(path)
    assert config.data.path == "/secret/place" and config.data.cache == "/secret/place/cache"
    text = dump_config(config)
    assert "${oc.env:NTPSEG_PLACE}" in text and "secret" not in text
    assert "/secret/place/cache" in dump_config(config, resolve=True)
    saved = tmp_path / "config.yaml"
    saved.write_text(text)
    assert load_config(saved).data == config.data
    with pytest.raises(ValueError, match="resume must continue") as caught:
        check_same_run(load_config(path, ["data.path=elsewhere"]), saved)
    assert "secret" not in str(caught.value)
    for bad in (
        "model.preset=${oc.env:NTPSEG_PLACE}",
        "seed=${oc.env:NTPSEG_PLACE}",
        "training.report_to=${data.path}",
    ):
        with pytest.raises(ValueError) as caught:
            load_config(path, [bad])
        assert "secret" not in str(caught.value), bad
    monkeypatch.delenv("NTPSEG_PLACE")
    with pytest.raises(ValueError, match="NTPSEG_PLACE"):
        load_config(saved)


def test_the_program_ends_in_one_line_without_a_traceback() -> None:
    command = [sys.executable, "-m", "ntpseg.cli", "train", "tiny", "training.learning_rate=nan"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip() == "ntpseg: training.learning_rate must be a number >= 0 and <= 3.4e+38, got 'nan'"


def test_bf16() -> None:
    assert resolve_bf16(True) is True and resolve_bf16(False) is False
    assert isinstance(resolve_bf16("auto"), bool)
    with pytest.raises(ValueError, match=r"training\.bf16 must be .* got .maybe."):
        resolve_bf16("maybe")


@pytest.mark.parametrize("name", ZERO_STAGES)
def test_deepspeed_files(name) -> None:
    pytest.importorskip("deepspeed")
    config = deepspeed_config(name)
    assert config["zero_optimization"]["stage"] == int(name.removeprefix("zero")[0])
    assert ("offload_optimizer" in config["zero_optimization"]) == name.endswith("_offload")
    assert deepspeed_config(str(CONFIGS / f"{name}.json")) == config


def test_deepspeed_errors(tmp_path) -> None:
    assert deepspeed_config(None) is None
    with pytest.raises(ValueError, match=r"deepspeed must be one of .* got 'zero9'"):
        deepspeed_config("zero9")
    (tmp_path / "bad.json").write_text(json.dumps({})[:-1])
    with pytest.raises(ValueError, match="must be a file of valid JSON"):
        deepspeed_config(str(tmp_path / "bad.json"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "have zero_optimization.stage 1, 2 or 3, got 0 in"),
        ({"zero_optimization": {"stage": 0}}, "have zero_optimization.stage 1, 2 or 3, got 0 in .*; without DeepSpeed"),
        ([], "have zero_optimization.stage 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True, "check_grad_overflow": False}},
            "leave bf16.check_grad_overflow on, got false",
        ),
    ],
)
def test_deepspeed_must_skip_steps_that_are_not_finite(tmp_path, content, message) -> None:
    """Stage 0 takes them, and the weights are lost."""
    path = tmp_path / "own.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"deepspeed must {message}"):
        deepspeed_config(str(path))
