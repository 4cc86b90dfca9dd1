"""What one training step works on, from a configuration alone: no data, no tokenizer, no weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ntpseg.cluster.communication import ModelShape
from ntpseg.models.flops import TrainingFlops
from ntpseg.training.config import RunConfig
from ntpseg.utils.checks import check_integer

# Of the vision tokenizers when the configuration gives no path; see `CompactVQOptions` and Emu3's.
_FACTOR, _CODES = 8, 512


@dataclass(frozen=True)
class Workload:
    """A model and its sequences.

    Attributes:
        shape: of the model's parameters.
        flops: of a sequence, all of it forward and backward once.
        tokens: of a sequence.
        micro_batch: sequences of a GPU's batch that the configuration asks for.
        accumulation: batches of a step that it asks for.
        activation_checkpointing: layers run forward twice.
        hard_tokens: entries of a sample in the hard-token memory.
        negatives: of TCL.
    """

    shape: ModelShape
    flops: float
    tokens: int
    micro_batch: int
    accumulation: int
    activation_checkpointing: bool
    hard_tokens: int
    negatives: int

    @classmethod
    def of(cls, config: RunConfig, *, text_tokens: int = 32) -> Workload:
        """Of a configuration.

        Args:
            config: of a run; its data are not needed.
            text_tokens: length of a sentence, which only the data tell.

        Raises:
            ValueError: `text_tokens` is below 1, or the configuration cannot be built.
        """
        check_integer("text_tokens", text_tokens, 1)
        from ntpseg.models import NTPSegModel, preset_config

        sequence = _sequence(config)
        settings, loss = config.model, config.loss
        options: dict[str, Any] = {
            "num_heads_k": settings.k,
            "grid_positions": settings.grid_positions,
            "front_end": settings.front_end,
            "stem": settings.stem or None,
            "channels": config.data.channels,
            "image_size": config.data.size,
            "patch_size": _vision(config, "factor", _FACTOR),
            "negatives": loss.negatives,
        }
        model_config = preset_config(settings.preset, sequence, overrides=settings.overrides, **options)
        with torch.device("meta"):
            model = NTPSegModel(model_config)
        flops = TrainingFlops.of(model)
        image = None if sequence.image_grid is None else np.zeros(sequence.image_grid, np.int64)
        ids, labels = sequence.build([0] * text_tokens, image, np.zeros(sequence.mask_grid, np.int64))
        supervised = int((labels != -100).sum())
        training = config.training
        return cls(
            shape=ModelShape.of(model),
            flops=flops.step(tokens=len(ids), squares=len(ids) ** 2, rows=[float(supervised)] * settings.k, images=1.0),
            tokens=len(ids),
            micro_batch=int(training.get("per_device_train_batch_size", 8)),
            accumulation=int(training.get("gradient_accumulation_steps", 1)),
            activation_checkpointing=bool(
                training.get("activation_checkpointing", training.get("gradient_checkpointing", False))
            ),
            hard_tokens=loss.hard_tokens,
            negatives=loss.negatives,
        )


class _Spelled:
    """A text tokenizer of one id a character, as Qwen's spells numbers."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [0] * len(text)


def _sequence(config: RunConfig) -> Any:
    from ntpseg.tokenizers.sequence import SequenceFormat
    from ntpseg.tokenizers.vocabulary import Vocabulary

    cells = config.data.size // _vision(config, "factor", _FACTOR)
    if config.layout == "emu3":
        return SequenceFormat.for_tokenizer(Vocabulary.emu3(), (cells, cells), (cells, cells), _Spelled())
    read = config.model.front_end in ("codes", "both")
    image_codes = _vision(config, "image_codes", _CODES) if read else 0
    vocabulary = Vocabulary(config.text.vocab_size, image_codes, _vision(config, "mask_codes", _CODES))
    return SequenceFormat(vocabulary, (cells, cells) if read else None, (cells, cells))


def _vision(config: RunConfig, name: str, default: int) -> int:
    return int(config.vision.get(name, default) or default)
