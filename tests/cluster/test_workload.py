"""What a configuration trains, without its data: the sequences and the model that preparation and training make."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_segmenter import write_dataset, write_manifest

from ntpseg.cluster.communication import ModelShape
from ntpseg.cluster.workload import Workload, model_config, sequence_format
from ntpseg.tokenizers.compact import CompactVQOptions
from ntpseg.training import load_config
from ntpseg.training.arguments import DEFAULTS
from ntpseg.training.builders import make_model
from ntpseg.training.config import CONFIGS
from ntpseg.training.preparation import prepare_run

SMALL = (
    "data.skip_bad=true",
    "data.size=32",
    "data.variants=0",
    "vision.steps=0",
    "vision.image_codes=16",
    "vision.mask_codes=8",
    "text.vocab_size=260",
    "model.overrides={hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2, "
    "num_key_value_heads: 2, head_dim: 16}",
)


@pytest.mark.parametrize("settings", [(), ("front_end=both",), ("front_end=features",), ("stem.aligned=false",)])
def test_sequences_and_model_are_those_of_a_run(settings: tuple[str, ...], tmp_path: Path) -> None:
    if "stem.aligned=false" in settings:
        settings = ("front_end=features", *settings)
    records = write_dataset(tmp_path / "data", 6)
    write_manifest(tmp_path / "data.csv", records)
    where = (f"data.path={tmp_path / 'data.csv'}", f"output={tmp_path / 'run'}")
    config = load_config("tiny", [*where, *SMALL, *(f"model.{setting}" for setting in settings)])
    (tmp_path / "run").mkdir()
    prepared = prepare_run(config, tmp_path / "run", progress=False)
    # The captions of six pairs need fewer ids than a tokenizer may have.
    config.text.vocab_size = len(prepared.text)
    assert sequence_format(config) == prepared.sequence
    model = make_model(config, prepared)
    assert model_config(config).to_dict() == model.config.to_dict()
    assert Workload.of(config).shape.parameters == ModelShape.of(model).parameters


def test_defaults_are_those_of_tokenizers_and_training(tmp_path: Path) -> None:
    """Of a file that says neither codes nor batch."""
    (tmp_path / "plain.yaml").write_text("model: {preset: tiny}\n")
    config = load_config(tmp_path / "plain.yaml")
    vocabulary, options = sequence_format(config).vocabulary, CompactVQOptions()
    assert (vocabulary.image_codes, vocabulary.mask_codes) == (options.image_codes, options.mask_codes)
    assert Workload.of(config).micro_batch == DEFAULTS["per_device_train_batch_size"]


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_ready_configuration_has_a_workload(name: str) -> None:
    config = load_config(name)
    work, vocabulary = Workload.of(config), sequence_format(config).vocabulary
    assert work.micro_batch == config.training["per_device_train_batch_size"]
    if config.layout == "ntpseg":
        assert vocabulary.mask_codes == config.vision["mask_codes"]
    dense = [weight for weight in (config.loss.dice, config.loss.pixel, config.loss.soft) if weight]
    assert work.shape.terms == 4 + len(dense)


def test_shared_sequences_are_not_modelled() -> None:
    config = load_config("tiny", ["training.sequence_parallel_size=2", "data.mask_noise=0"])
    with pytest.raises(ValueError, match=r"training\.sequence_parallel_size must be 1 for plans .*, got 2"):
        Workload.of(config)
