"""The values of a configuration: kind and range of every key, so that a wrong one ends before anything is prepared."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ntpseg.training.argument_rules import (
    MAX_INTEGER,
    check_combinations,
    check_training,
    integer,
    number,
    optional,
    shown,
)
from ntpseg.training.sampling import SamplingOptions
from ntpseg.utils.checks import check_choice, check_multiple

if TYPE_CHECKING:
    from ntpseg.training.config import ModelConfig, RunConfig

# Larger images would be resized to more than any model here reads.
MAX_SIZE = 16384
# Rows of packed sequences: attention of some implementations grows with their square.
MAX_PACKED = 2**20
MAX_SEED = 2**32 - 1  # of NumPy's generators


def check_sections(config: RunConfig) -> None:
    """Check every section of a configuration.

    Raises:
        ValueError: a value of the wrong kind or out of range; it names the key.
    """
    from ntpseg.data import Augmentation
    from ntpseg.data.layouts import LAYOUT_NAMES
    from ntpseg.losses.dense import DenseLossOptions
    from ntpseg.losses.options import LossOptions
    from ntpseg.tokenizers.compact import CompactVQOptions

    integer(1, MAX_SIZE)("data.size", config.data.size)
    integer(0, 10_000)("data.variants", config.data.variants)
    optional(integer(1, MAX_PACKED))("data.packing", config.data.packing)
    check_choice("data.layout", config.data.layout, LAYOUT_NAMES)
    SamplingOptions(config.data.empty_share, config.data.pairs_per_volume)
    if config.data.empty_share is not None and not config.data.keep_empty:
        raise ValueError(
            "data.empty_share must be null without data.keep_empty=true, which keeps pairs without foreground, "
            f"got {config.data.empty_share}"
        )
    _build("data.augment", Augmentation, config.data.augment)
    if config.text.path is None:
        integer(257, 10_000_000)("text.vocab_size", config.text.vocab_size)  # 256 bytes, end of text
    integer(0, MAX_SEED)("seed", config.seed)
    if config.max_minutes is not None:
        number(above=0, maximum=MAX_INTEGER)("max_minutes", config.max_minutes)
    _check_model(config.model)
    loss = config.loss
    for name in ("negatives", "hard_tokens"):
        integer(0)(f"loss.{name}", getattr(loss, name))
    for name in ("tcl_weight", "het_weight", "dice", "pixel", "soft"):
        number(0)(f"loss.{name}", getattr(loss, name))
    for name in ("temperature", "soft_temperature"):
        number(above=0)(f"loss.{name}", getattr(loss, name))
    _build("loss", LossOptions, {"head_weights": loss.head_weights})
    if loss.head_weights is not None and len(loss.head_weights) != config.model.k:
        raise ValueError(
            f"loss.head_weights must have model.k, {config.model.k}, numbers, got {shown(loss.head_weights)}"
        )
    _build("loss", DenseLossOptions, {"dice": loss.dice, "pixel": loss.pixel, "soft": loss.soft})
    number(above=0)("optimizer.muon_learning_rate", config.optimizer.muon_learning_rate)
    vision = dict(config.vision)
    if vision.pop("path", None) is None:
        options = _build("vision", CompactVQOptions, vision)
        for name in ("image_codes", "mask_codes", "dim", "width", "depth", "steps", "batch_size", "codebook_patches"):
            integer(0)(f"vision.{name}", getattr(options, name))
        integer(0, MAX_SEED)("vision.seed", options.seed)
        check_multiple("data.size", config.data.size, "vision.factor", options.factor)
    elif not isinstance(config.vision["path"], str):
        raise ValueError(f"vision.path must be a directory, got {shown(config.vision['path'])}")
    check_training(config.training)
    if config.training.get("sequence_parallel_size", 1) > 1:
        whole = {"data.packing": config.data.packing, "model.mask_inputs": config.model.mask_inputs}
        for name, value in {**whole, "model.prefix_lm": config.model.prefix_lm or None}.items():
            if value is not None:
                raise ValueError(
                    f"{name} must be off with training.sequence_parallel_size above 1, whose ranks have a part of each "
                    f"sequence, got {shown(value)}"
                )
    check_combinations(
        config.training,
        max_minutes=config.max_minutes,
        optimizer=config.optimizer.name,
        ema=config.optimizer.ema,
    )


def _check_model(model: ModelConfig) -> None:
    from transformers import AutoConfig

    from ntpseg.models.mask_inputs import MaskInputOptions
    from ntpseg.models.presets import PRESETS
    from ntpseg.models.stem import StemOptions

    check_choice("model.preset", model.preset, PRESETS)
    integer(1, 1024)("model.k", model.k)
    if model.mask_inputs is not None:
        _build("model.mask_inputs", MaskInputOptions, model.mask_inputs)
    stem = _build("model.stem", StemOptions, model.stem)
    for name, values in {
        "widths": stem.widths,
        "depth": (stem.depth,),
        "caption_hidden": (stem.caption_hidden,),
    }.items():
        for value in values:
            integer(1, 65536)(f"model.stem.{name}", value)
    if model.front_end == "codes" and model.encoder_weights is not None:
        raise ValueError(
            "model.encoder_weights must be null with model.front_end=codes, which has no encoder, "
            f"got {shown(model.encoder_weights)}"
        )
    preset = PRESETS[model.preset]
    for name, value in model.overrides.items():
        if isinstance(preset.get(name), int):
            integer(1)(f"model.overrides.{name}", value)
        elif isinstance(preset.get(name), float):
            number(0)(f"model.overrides.{name}", value)
    text = {**preset, **model.overrides}
    heads, groups = text["num_attention_heads"], text["num_key_value_heads"]
    if heads % groups:
        raise ValueError(
            f"model.overrides.num_attention_heads must be a multiple of num_key_value_heads, {groups}, got {heads}"
        )
    kind = text.pop("model_type")
    if kind != preset["model_type"] and not isinstance(kind, str):
        raise ValueError(f"model.overrides.model_type must be a name, got {shown(kind)}")
    _build("model.overrides", lambda **fields: AutoConfig.for_model(kind, **fields), text)


def _build(section: str, make: Callable[..., Any], fields: dict[str, Any]) -> Any:
    """``make(**fields)``; whatever the options' class has against them is told of the section."""
    try:
        return make(**fields)
    except Exception as error:  # a value of any kind meets arithmetic, iteration and other libraries' checks
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{section} must hold valid settings, got {shown(fields)}: {reason}") from error
