"""The recipe with image features from files to masks: train, the saved decoding, predict and evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_segmenter import TEXTS, write_dataset, write_manifest
from typer.testing import CliRunner

from ntpseg.cli import app
from ntpseg.evaluation.run_directory import training_log
from ntpseg.generation import DecodingOptions, Segmenter
from ntpseg.generation.options import NonFiniteOutput
from ntpseg.models import Bundle
from ntpseg.tokenizers.pixel_cache import PixelCache
from ntpseg.training import load_config, pipeline, train
from ntpseg.training.pipeline import make_model
from ntpseg.training.preparation import prepare_run

FAST = [
    "data.size=32",
    "vision.mask_codes=16",
    "text.vocab_size=300",
    "max_minutes=null",
    "model.stem.widths=[8,16]",
    "model.stem.group_size=4",
    "model.stem.caption_dim=8",
    "model.overrides.hidden_size=32",
    "model.overrides.intermediate_size=48",
    "model.overrides.num_hidden_layers=1",
    "model.overrides.head_dim=8",
    "training.per_device_train_batch_size=4",
    "training.num_train_epochs=2",
    "training.logging_steps=1",
    "training.eval_strategy=epoch",
    "training.save_strategy=epoch",
    "training.bf16=false",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("squares")
    # Without the empty masks, which training refuses.
    write_manifest(folder / "data.csv", [r for r in write_dataset(folder) if r.text != TEXTS[2]])
    return folder / "data.csv"


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "features"
    result = invoke("train", "qata", f"data.path={data}", f"output={output}", *FAST)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return output


def test_run_directory(run, data) -> None:
    lines = training_log(run)
    training = [line for line in lines if "loss" in line]
    assert {"dice", "pixel", "ntp", "token_accuracy"} <= set(training[0]) and "soft" not in training[0]
    evaluated = [line for line in lines if "eval_loss" in line]
    assert len(evaluated) == 2
    assert all(0.0 <= line["eval_token_dice"] <= 1.0 and "eval_dice" in line for line in evaluated)
    assert (run / f"checkpoint-{training[-1]['step']}" / "ema.safetensors").is_file()
    prepared = prepare_run(load_config(run), run, progress=False)
    assert isinstance(prepared.training, PixelCache) and prepared.sequence.image_grid is None
    assert prepared.vision.image_codes == 0


def test_the_decoding_is_chosen_on_validation_and_saved(run) -> None:
    saved = json.loads((run / "model" / "decoding.json").read_text())
    choice = json.loads((run / "decoding_choice.json").read_text())
    assert saved == choice["options"]
    assert saved["method"] == "refine" and saved["passes"] in (0, 1, 2)
    tried = {(row["passes"], row["threshold"]): row["dice"] for row in choice["tried"]}
    best = max(dice - 0.001 * passes for (passes, _), dice in tried.items())
    chosen = tried[saved["passes"], saved["threshold"]] - 0.001 * saved["passes"]
    assert chosen == pytest.approx(best, abs=2e-5)
    options = DecodingOptions.of_bundle(Bundle.from_pretrained(run))
    assert (options.method, options.passes, options.threshold) == ("refine", saved["passes"], saved["threshold"])
    fitted = choice["calibration"]["calibrated"]
    assert options.calibration_temperature == saved["calibration_temperature"] == fitted["temperature"]
    assert fitted["nll"] <= choice["calibration"]["uncalibrated"]["nll"]


@pytest.mark.parametrize(
    ("error", "code"), [(NonFiniteOutput("the model's output must be finite"), 0), (RuntimeError("out of memory"), 1)]
)
def test_a_model_is_saved_whatever_becomes_of_the_choice(data, tmp_path, monkeypatch, error, code) -> None:
    def fail(bundle, *arguments, **options):
        raise error

    monkeypatch.setattr(pipeline, "choose_decoding", fail)
    settings = [*FAST, "training.save_strategy=no", "training.eval_strategy=no", "training.num_train_epochs=1"]
    result = invoke("train", "qata", f"data.path={data}", f"output={tmp_path / 'run'}", *settings)
    assert result.exit_code == code, result.output
    if not code:
        assert "the decoding was not chosen on validation: the model's output must be finite" in result.output
    assert not (tmp_path / "run" / "model.part").exists()
    options = DecodingOptions.of_bundle(Bundle.from_pretrained(tmp_path / "run"))
    assert (options.method, options.passes, options.threshold) == ("refine", 0, 0.5)


def test_the_saved_weights_are_the_average(run) -> None:
    from safetensors.torch import load_file

    last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    average, saved = load_file(last / "ema.safetensors"), Bundle.from_pretrained(run).model.state_dict()
    for name, value in average.items():
        if name != "steps":
            assert torch.equal(saved[name], value), name
    final = load_file(last / "model.safetensors")
    assert any(not torch.equal(saved[name], final[name]) for name in average if name != "steps")


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        ((), {}),
        (("--passes", "2"), {"passes": 2}),
        (("--threshold", "0.05"), {"threshold": 0.05}),
        (("--method", "greedy"), {"method": "greedy"}),
        (("--method", "sample", "--samples", "2"), {"method": "sample", "samples": 2}),
        (("--mirror", "--passes", "0"), {"mirror": True, "passes": 0}),
    ],
)
def test_predict(run, data, tmp_path, arguments, changes) -> None:
    image = data.parent / "img" / "p3_0.png"
    out = tmp_path / "mask.png"
    result = invoke(
        *("predict", "--model", run, "--image", image, "--text", TEXTS[0], "--out", out, "--dtype", "float32"),
        *arguments,
    )
    assert result.exit_code == 0, result.output + repr(result.exception)
    mask = np.asarray(Image.open(out)) > 0
    segmenter = Segmenter.from_pretrained(run, dtype="float32", **changes)
    for name, value in changes.items():
        assert getattr(segmenter.options, name) == value
    np.testing.assert_array_equal(mask, segmenter.segment(image, TEXTS[0]).mask)
    assert mask.shape == (40, 56)
    if "threshold" in changes:
        assert mask.sum() >= Segmenter.from_pretrained(run, dtype="float32").segment(image, TEXTS[0]).mask.sum()


def test_evaluate(run, tmp_path) -> None:
    result = invoke("eval", "--model", run, "--split", "val", "--text-check", "1", "--passes", "1", "--out", tmp_path)
    assert result.exit_code == 0, result.output + repr(result.exception)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["decoding"]["method"] == "refine" and summary["decoding"]["steps"] == 2
    assert 0 <= summary["per_image"]["dice"]["value"] <= 1


CODES = ("model.front_end=codes", "loss.pixel=0.0", "vision.image_codes=8")


@pytest.mark.parametrize(
    "settings",
    [
        ["model.front_end=both", "vision.image_codes=8"],
        ["model.stem.aligned=false"],
        [*CODES, "data.variants=1", "model.prefix_lm=true"],
        [*CODES, "model.grid_positions=false", "model.mask_inputs=null"],
        [*CODES, "model.grid_positions=false", "model.mask_inputs=null", "loss.dice=0.0", "model.prefix_lm=true"],
    ],
)
def test_other_front_ends_train_and_predict(data, tmp_path, settings) -> None:
    """As the study's ablation sets them; every one evaluates, is saved and decodes."""
    config = load_config("qata", [f"data.path={data}", f"output={tmp_path / 'r'}", *FAST, *settings])
    config.training |= {"num_train_epochs": 1, "save_strategy": "no"}
    run = train(config, progress=False)
    records = data.parent / "img" / "p0_0.png"
    assert Segmenter.from_pretrained(run).segment(records, TEXTS[0]).mask.shape == (48, 48)
    assert any("eval_token_dice" in line for line in training_log(run))


def test_features_apart_with_a_tokenizer_that_has_image_codes(data, run, tmp_path) -> None:
    """The places of features are on one code, whatever the vision tokenizer could say."""
    codes = load_config(
        "qata",
        [f"data.path={data}", f"output={tmp_path / 'c'}", *FAST, "model.front_end=both", "vision.image_codes=8"],
    )
    prepare_run(codes, tmp_path / "c", progress=False)
    settings = ["model.stem.aligned=false", "training.num_train_epochs=1", "training.save_strategy=no"]
    config = load_config("qata", [f"data.path={data}", f"output={tmp_path / 'r'}", *FAST, *settings])
    config.vision = {"path": str(tmp_path / "c" / "tokenizers" / "vision")}
    assert Segmenter.from_pretrained(train(config, progress=False)).bundle.sequence.vocabulary.image_codes == 1


def test_starting_from_saved_weights(run, tmp_path) -> None:
    """Also of a model that was saved without the patches of its codes, or with another tokenizer's."""
    config, trained = load_config(run), Bundle.from_pretrained(run).model
    state = {name: value for name, value in trained.state_dict().items() if name != "readout.patches"}
    trained.save_pretrained(tmp_path, state_dict=state)
    config.model.weights = str(tmp_path)
    prepared = prepare_run(config, run, progress=False)
    model = make_model(config, prepared)
    for name, value in state.items():
        assert torch.equal(model.state_dict()[name], value), name
    assert torch.equal(model.readout.patches, prepared.vision.mask_patches().flatten(1))
    assert torch.equal(model.readout.patches, trained.readout.patches) and model.readout.patches.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["data.variants=2"],
            r"data\.variants must be 0 with front_end 'features', which augments as it trains, got 2",
        ),
        (["layout=emu3"], r"layout must be ntpseg with front_end 'features', got 'emu3'"),
        (["data.mask_noise=0.1"], r"data\.mask_noise must be 0 with model\.mask_inputs, got 0\.1"),
        (["optimizer.name=sgd"], r"optimizer\.name must be one of adamw, muon, got 'sgd'"),
        (["optimizer.ema=1.0"], r"optimizer\.ema must be a number >= 0 and < 1, got 1\.0"),
        (["deepspeed=zero2"], r"optimizer\.name must be adamw with deepspeed, .* got 'muon'"),
    ],
)
def test_wrong_settings_are_named(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("qata", settings)
