"""No field of `transformers.TrainingArguments` is overridden or ignored in silence, and no value is out of range."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from ntpseg.training import argument_rules
from ntpseg.training.argument_rules import ACCEPTED, REFUSED, check_training
from ntpseg.training.arguments import FIXED, training_arguments
from ntpseg.training.config import load_config

FIELDS = [field.name for field in dataclasses.fields(transformers.TrainingArguments)]
# Values that differ from what a run has without them; None: needs hardware or packages, or another field.
HONOURED: dict[str, Any] = {
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 5,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 7,
    "max_steps": 11,
    "learning_rate": 0.25,
    "lr_scheduler_type": "linear",
    "warmup_steps": 13,
    "weight_decay": 0.5,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 1e-3,
    "max_grad_norm": 3.0,
    "neftune_noise_alpha": 2.0,
    "torch_empty_cache_steps": 4,
    "logging_steps": 17,
    "eval_steps": 19,
    "eval_delay": 3,
    "save_steps": 23,
    "save_total_limit": 9,
    "full_determinism": True,
    "dataloader_num_workers": 2,
    "dataloader_in_order": False,
    "ddp_timeout": 60,
    "skip_memory_metrics": False,
}


def test_a_setting_of_the_run_is_told_where_it_stands() -> None:
    with pytest.raises(ValueError, match=r"max_skipped_steps must not be set \(it stands outside"):
        check_training({"max_skipped_steps": 1})


def test_every_field_has_one_rule() -> None:
    assert not set(ACCEPTED) & set(REFUSED)
    new = set(FIELDS) - set(ACCEPTED) - set(REFUSED)
    assert not new, f"transformers {transformers.__version__} has new fields: honour or refuse {new}"


def test_nothing_that_the_pipeline_fixes_is_accepted() -> None:
    assert set(FIXED) <= set(REFUSED)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_field_says_why_on_one_line(name: str) -> None:
    if name not in FIELDS:
        pytest.skip("not in this transformers")
    with pytest.raises(ValueError, match=rf"^training\.{name} must not be set \(.{{8,}}\), got ") as caught:
        load_config("tiny", [f"training.{name}=true"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(HONOURED))
def test_an_accepted_field_reaches_the_trainer(name: str, tmp_path) -> None:
    config = load_config("tiny", [f"training.{name}={HONOURED[name]}"])
    assert getattr(training_arguments(config, tmp_path), name) == HONOURED[name]


def test_a_field_of_a_later_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(argument_rules, "_fields", lambda: ([*FIELDS, "new_switch"], "9.9"))
    with pytest.raises(ValueError, match=r"training\.new_switch must not be set \(it is new in transformers 9\.9 "):
        check_training({"new_switch": True})


def test_a_secret_is_not_shown() -> None:
    with pytest.raises(ValueError) as caught:
        check_training({"hub_token": "hf_secret"})
    assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("logging_dir", "trainer_log.jsonl"),
        ("group_by_length", "permutation"),
        ("evaluation_strategy", "eval_strategy"),
        ("learning_rat", "did you mean learning_rate"),
    ],
)
def test_former_and_misspelt_fields_are_explained(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_config("tiny", [f"training.{name}=1"])


@pytest.mark.parametrize(
    "value", ["nan", ".inf", "-.inf", "-1", "true", "null", "fast", "[1]", "{a: 1}", "1e999", "1" + "0" * 400]
)
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "per_device_train_batch_size", "num_train_epochs"])
def test_wrong_values_are_named(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"training\.{name} must be .*, got ") as caught:
        load_config("tiny", [f"training.{name}={value}"])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["max_minutes=1", "training.lr_scheduler_type=linear"], "lr_scheduler_type must not be set with max_minutes"),
        (["optimizer.name=muon", "training.optim=adamw_torch"], "optim must not be set with optimizer.name=muon"),
        (["training.bf16=true", "training.fp16=true"], "fp16 must be false with training.bf16=true"),
        (["optimizer.ema=0.9", "training.load_best_model_at_end=true"], "load_best_model_at_end must be false"),
        (["training.bf16=1"], "bf16 must be auto, true or false, got 1"),
        (["training.max_steps=0"], "max_steps must be an integer >= 1"),
    ],
)
def test_fields_that_another_setting_overrides(settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("tiny", settings)


@pytest.mark.parametrize(
    "settings",
    [
        ["training.lr_scheduler_type=linear", "training.lr_scheduler_kwargs={nonsense: 1}"],
        ["training.load_best_model_at_end=true", "training.save_strategy=no"],
        ["training.debug=nonsense"],
        ["training.dataloader_prefetch_factor=2"],
    ],
)
def test_what_transformers_refuses_is_one_line(settings: list[str], tmp_path) -> None:
    with pytest.raises(ValueError, match=r"^training must be fields that TrainingArguments accepts, got: ") as caught:
        training_arguments(load_config("tiny", settings), tmp_path)
    assert "\n" not in str(caught.value)


def test_the_hint_of_unknown_fields_needs_no_text_keys() -> None:
    with pytest.raises(ValueError, match="training must hold fields"):
        check_training({1: 2})
    assert argument_rules.shown(SimpleNamespace(text="x" * 200)).endswith("...")


@pytest.mark.parametrize("version", [1, "1"])
def test_the_average_of_fsdp_1_is_refused(version) -> None:
    """There each rank would take its part of a weight for all of it."""
    from ntpseg.training.argument_rules import check_combinations

    fields = {"fsdp": True, "fsdp_config": {"version": version}}
    with pytest.raises(ValueError, match=r"training\.fsdp_config\.version must be 2 with optimizer\.ema, .* got .?1"):
        check_combinations(fields, max_minutes=None, optimizer="adamw", ema=0.99)
    check_combinations(fields, max_minutes=None, optimizer="adamw", ema=0.0)
    for config in ({"version": 2}, {}, None):
        check_combinations({"fsdp": True, "fsdp_config": config}, max_minutes=None, optimizer="adamw", ema=0.99)


@pytest.mark.parametrize("installed", ["activation_checkpointing", "gradient_checkpointing"])
def test_activation_checkpointing_is_one_switch_in_every_release(monkeypatch, installed) -> None:
    from ntpseg.training import argument_rules

    monkeypatch.setattr(argument_rules, "_own_fields", lambda: [installed, "gradient_checkpointing", "fp16"])
    argument_rules.check_training({"activation_checkpointing": True, "fp16": False})
    assert argument_rules.installed_names({"activation_checkpointing": True}) == {installed: True}
    assert argument_rules.installed_names({"gradient_checkpointing": True}) == {"gradient_checkpointing": True}
    with pytest.raises(ValueError, match=r"training\.activation_checkpointing must be true or false, got 'yes'"):
        argument_rules.check_training({"activation_checkpointing": "yes"})
    both = {"activation_checkpointing": True, "gradient_checkpointing": False}
    with pytest.raises(
        ValueError, match=r"training\.gradient_checkpointing must not be set with training\.activation_"
    ):
        argument_rules.check_combinations(both, max_minutes=None, optimizer="adamw", ema=0.0)
