from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel, LlamaConfig

from ntpseg.models import PRESETS, NTPSegConfig, NTPSegModel, preset_config
from ntpseg.tokenizers.sequence import SequenceFormat
from ntpseg.tokenizers.vocabulary import Vocabulary

# Layers alone; embeddings and heads depend on the vocabulary.
LAYERS = {"tiny": 3.1647e6, "small": 25.70e6, "base": 113.27e6, "emu3-8b": 6979.58e6}


@pytest.mark.parametrize("preset", PRESETS)
def test_parameter_counts(preset: str) -> None:
    if preset == "emu3-8b":
        sequence = SequenceFormat(Vocabulary.emu3(), (28, 28), (28, 28), "emu3", (1, 2, 3), (1, 2, 3))
    else:
        sequence = SequenceFormat(Vocabulary(512, 512, 64), (16, 16), (16, 16))
    with torch.device("meta"):
        model = NTPSegModel(preset_config(preset, sequence, num_heads_k=4))
    layers = sum(p.numel() for p in model.backbone.layers.parameters())
    assert layers == pytest.approx(LAYERS[preset], rel=1e-3)
    width, vocabulary = model.config.hidden_size, sequence.vocabulary.size
    # embedding, final norm, head matrix, and three head transforms with their biases
    rest = 2 * vocabulary * width + width + 3 * (width * width + width)
    assert sum(p.numel() for p in model.parameters()) == layers + rest


def test_emu3_preset_has_emu3_sizes() -> None:
    from transformers import Emu3TextConfig

    emu3, ours = Emu3TextConfig(), AutoConfig.for_model(**PRESETS["emu3-8b"])
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        assert getattr(ours, name) == getattr(emu3, name), name
    for name in ("rms_norm_eps", "max_position_embeddings", "attention_dropout", "hidden_act"):
        assert getattr(ours, name) == getattr(emu3, name), name
    assert ours.rope_parameters["rope_theta"] == emu3.rope_parameters["rope_theta"]


def test_round_trip(tmp_path, sequence) -> None:
    config = preset_config("tiny", sequence, num_heads_k=5, grid_positions=True, negatives=3)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, NTPSegConfig)
    path = "_name_or_path"
    assert {**again.to_dict(), path: ""} == {**config.to_dict(), path: ""}
    assert again.text_config.hidden_size == again.hidden_size == 256


def test_auto_model_and_own_copy_of_the_config(make_model) -> None:
    config = make_model().config
    eager = copy.deepcopy(config)
    eager._attn_implementation = "eager"
    one, two = AutoModel.from_config(config), NTPSegModel(eager)
    assert one.config.text_config is not config.text_config
    assert one.backbone.config._attn_implementation == "sdpa"
    assert two.backbone.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads_k": 0}, "num_heads_k must be an integer >= 1, got 0"),
        ({"vocab_range": (5, 10**6)}, "vocab_range must be"),
        ({"grid_positions": 7}, "grid_positions must be .* got 7"),
        ({"text_config": {"model_type": "gpt2"}}, "text_config.model_type must be one of .* got 'gpt2'"),
    ],
)
def test_errors(sequence, change, message) -> None:
    fields = preset_config("tiny", sequence).to_dict() | change
    with pytest.raises(ValueError, match=message):
        NTPSegConfig(**fields)


def test_preset_errors(sequence) -> None:
    with pytest.raises(ValueError, match=r"preset must be one of .* got 'huge'"):
        preset_config("huge", sequence)
    with pytest.raises(ValueError, match=r"overrides must be fields of .* got 'num_layers'"):
        preset_config("tiny", sequence, overrides={"num_layers": 3})


def test_takes_a_config_object() -> None:
    config = NTPSegConfig(text_config=LlamaConfig(hidden_size=64, num_hidden_layers=1), vocab_size=99)
    assert config.text_config.vocab_size == 99
