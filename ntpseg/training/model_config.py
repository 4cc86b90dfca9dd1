"""What a run's configuration says of its model, by its tokenizers' sizes alone: sequences and `NTPSegConfig`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from ntpseg.models.presets import preset_config
from ntpseg.models.pretrained_encoder import huggingface_encoder_config
from ntpseg.models.stem import StemOptions
from ntpseg.tokenizers.sequence import SequenceFormat
from ntpseg.tokenizers.vision import VisionSizes
from ntpseg.tokenizers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from ntpseg.models.config import NTPSegConfig
    from ntpseg.training.config import ModelConfig, RunConfig


class TextSizes(Protocol):
    """Of a text tokenizer: its ids with the added ones (``len``) and without, and how it spells."""

    vocab_size: int

    def __len__(self) -> int: ...

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Ids of a text."""
        ...


def prompt_has_codes(config: RunConfig) -> bool:
    """Whether the image is read as tokens, by themselves or beside features."""
    return config.model.front_end != "features"


def sequence_format(config: RunConfig, vision: VisionSizes, text: Any) -> SequenceFormat:
    """The sequences of a run.

    Args:
        config: the run's.
        vision: its vision tokenizer, or the sizes of one.
        text: its text tokenizer, or `TextSizes`.
    """
    if config.layout == "emu3":
        vocabulary = Vocabulary.emu3(vision.image_codes, text.vocab_size)
        return SequenceFormat.for_tokenizer(vocabulary, vision.image_grid, vision.mask_grid, text)
    aligned = config.model.stem.get("aligned", True)
    if prompt_has_codes(config):
        vocabulary = Vocabulary(len(text), vision.image_codes, vision.mask_codes, vision.shared_codebook)
    else:
        # Features that are not aligned stand where image tokens would, on one code.
        vocabulary = Vocabulary(len(text), 0 if aligned else 1, vision.mask_codes)
    image_grid = vision.image_grid if prompt_has_codes(config) or not aligned else None
    return SequenceFormat.for_tokenizer(vocabulary, image_grid, vision.mask_grid, text)


def model_config(config: RunConfig, sequence: SequenceFormat, vision: VisionSizes) -> NTPSegConfig:
    """The model's configuration.

    Args:
        config: the run's.
        sequence: its sequences.
        vision: its vision tokenizer, or the sizes of one.

    Raises:
        ValueError: a setting of the model that cannot be used.
    """
    loss, settings = config.loss, config.model
    dense = {name: getattr(loss, name) for name in ("dice", "pixel", "soft", "soft_temperature")}
    options: dict[str, Any] = {
        "num_heads_k": settings.k,
        "grid_positions": settings.grid_positions,
        "negatives": loss.negatives,
        "tcl_weight": loss.tcl_weight,
        "het_weight": loss.het_weight if loss.hard_tokens else 0.0,
        "temperature": loss.temperature,
        "head_weights": loss.head_weights,
        "front_end": settings.front_end,
        "stem": _stem_fields(settings),
        "channels": vision.channels,
        "image_size": vision.image_size,
        "patch_size": vision.factor,
        "mask_inputs": settings.mask_inputs,
        "dense_loss": dense if loss.dice or loss.pixel or loss.soft else None,
        "prefix_lm": settings.prefix_lm,
    }
    return preset_config(settings.preset, sequence, overrides=settings.overrides, **options)


def _stem_fields(settings: ModelConfig) -> dict[str, Any] | None:
    """The model configuration's ``stem``; the architecture of a Hugging Face encoder comes from its directory.

    Raises:
        ValueError: a field that a stem does not have, or an encoder without its directory.
    """
    if settings.front_end == "codes":
        return None
    fields = dict(settings.stem)
    if fields.get("encoder") == "huggingface" and not fields.get("encoder_config"):
        if settings.encoder_weights is None:
            raise ValueError("model.encoder_weights must be given with stem.encoder 'huggingface', got null")
        fields["encoder_config"] = huggingface_encoder_config(settings.encoder_weights)
    try:
        return asdict(StemOptions(**fields))
    except TypeError as error:
        raise ValueError(f"model.stem: {error}") from error
