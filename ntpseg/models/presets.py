"""Ready backbone sizes; every one is an ordinary Hugging Face decoder config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ntpseg.utils.checks import check_choice

if TYPE_CHECKING:
    from ntpseg.models.config import NTPSegConfig
    from ntpseg.tokenizers.sequence import SequenceFormat

_SHARED = {"attention_dropout": 0.0, "initializer_range": 0.02, "max_position_embeddings": 4096}

PRESETS: dict[str, dict[str, Any]] = {
    # Few wide layers: on a CPU that costs half of what the same number of parameters costs in many narrow ones.
    "tiny": {
        "model_type": "qwen3",
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
        **_SHARED,
    },
    "small": {
        "model_type": "qwen3",
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
        **_SHARED,
    },
    "base": {
        "model_type": "qwen3",
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "head_dim": 64,
        **_SHARED,
    },
    # Emu3's own sizes. Its text model is Llama's, layer for layer and name for name.
    "emu3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "max_position_embeddings": 9216,
        "attention_dropout": 0.1,
        "initializer_range": 0.02,
    },
}


def preset_config(
    preset: str, sequence: SequenceFormat, *, overrides: dict[str, Any] | None = None, **options: Any
) -> NTPSegConfig:
    """The model configuration of a preset for one sequence format.

    Args:
        preset: one of `PRESETS`.
        sequence: gives the vocabulary, the ranges of ids and the grids.
        overrides: fields of the Hugging Face config that replace the preset's, such as ``num_hidden_layers``.
        **options: further fields of `NTPSegConfig`; ``grid_positions`` is True (all cells) or False (the default).

    Raises:
        ValueError: an unknown preset or override.
    """
    from transformers import AutoConfig

    from ntpseg.models.config import NTPSegConfig

    check_choice("preset", preset, PRESETS)
    vocabulary = sequence.vocabulary
    text = {**PRESETS[preset], **(overrides or {})}
    known = {*PRESETS[preset], *vars(AutoConfig.for_model(text["model_type"]))}
    for name in overrides or {}:
        if name not in known:
            raise ValueError(f"overrides must be fields of a {text['model_type']} config, got {name!r}")
    text |= {"vocab_size": vocabulary.size, "pad_token_id": vocabulary.pad}
    text |= {"bos_token_id": vocabulary.bos, "eos_token_id": vocabulary.eom}
    grid_positions = sequence.grid_positions if options.pop("grid_positions", False) else 0
    fields: dict[str, Any] = {
        "vocab_size": vocabulary.size,
        "vocab_range": list(vocabulary.supervised_range),
        "image_range": list(vocabulary.image_range) if vocabulary.image_codes else None,
        "mask_range": list(vocabulary.mask_range),
        "image_grid": None if sequence.image_grid is None else list(sequence.image_grid),
        "mask_grid": list(sequence.mask_grid),
        "query_token": vocabulary.image_token if sequence.layout == "emu3" else vocabulary.bom,
        "grid_positions": grid_positions,
        "text_size": vocabulary.text_size,
        "blank_token": vocabulary.pad,
        "text_config": text,
    }
    return NTPSegConfig(**{**fields, **options})
