from __future__ import annotations

import json

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


def test_bf16() -> None:
    assert resolve_bf16(True) is True and resolve_bf16(False) is False
    assert isinstance(resolve_bf16("auto"), bool)
    with pytest.raises(ValueError, match=r"training\.bf16 must be .* got .maybe."):
        resolve_bf16("maybe")


@pytest.mark.parametrize("name", ZERO_STAGES)
def test_deepspeed_files(name) -> None:
    pytest.importorskip("deepspeed")
    config = deepspeed_config(name)
    assert config["zero_optimization"]["stage"] == int(name[-1])
    assert deepspeed_config(str(CONFIGS / f"{name}.json")) == config


def test_deepspeed_errors(tmp_path) -> None:
    assert deepspeed_config(None) is None
    with pytest.raises(ValueError, match=r"deepspeed must be one of .* got 'zero9'"):
        deepspeed_config("zero9")
    (tmp_path / "bad.json").write_text(json.dumps({})[:-1])
    with pytest.raises(ValueError, match="must be a file of valid JSON"):
        deepspeed_config(str(tmp_path / "bad.json"))
