"""What one training step works on, from a configuration alone: no data, no tokenizer, no weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ntpseg.cluster.communication import ModelShape
from ntpseg.cluster.sentences import Sentences
from ntpseg.cluster.sizes import DecoderSizes, ParameterCounts
from ntpseg.models.flops import TrainingFlops
from ntpseg.tokenizers.compact import CompactVQOptions
from ntpseg.tokenizers.vocabulary import EMU3_CODES, EMU3_TEXT_SIZE
from ntpseg.training import model_config as of_run
from ntpseg.training.arguments import DEFAULTS

if TYPE_CHECKING:
    from ntpseg.models.config import NTPSegConfig
    from ntpseg.tokenizers.sequence import SequenceFormat
    from ntpseg.training.config import RunConfig


@dataclass(frozen=True)
class Workload:
    """A model and its sequences; what plans and scaling curves are made of.

    Attributes:
        preset: of the model.
        sizes: of the decoder.
        parameters: their numbers by part.
        shape: all of them, in the order of their use; what is communicated.
        flops: operations per unit.
        classes: V', those that the loss's softmax runs over.
        vocabulary: V.
        heads: k.
        hard_tokens: kept per sample.
        supervised: labels of a sequence.
        tail: positions of a sequence that the heads read: from k before its first label on.
        fixed_tokens: tokens of a sequence without its text.
        causal_tokens: those of a sequence's end that follow a bidirectional prompt (prefix_lm); None: all is causal.
        sentences: text tokens and pairs.
        attention: its implementation; None: the device's default.
        micro_batch, accumulation: per_device_train_batch_size and gradient_accumulation_steps.
        checkpointing: activation_checkpointing.
        ema: an average of the weights is kept.
    """

    preset: str
    sizes: DecoderSizes
    parameters: ParameterCounts
    shape: ModelShape
    flops: TrainingFlops
    classes: int
    vocabulary: int
    heads: int
    hard_tokens: int
    supervised: int
    tail: int
    fixed_tokens: int
    causal_tokens: int | None
    sentences: Sentences
    attention: str | None
    micro_batch: int
    accumulation: int
    checkpointing: bool
    ema: bool

    @classmethod
    def of(cls, config: RunConfig, sentences: Sentences | None = None) -> Workload:
        """Of a configuration.

        Args:
            config: of a run; nothing is read but the configuration, no weight is allocated.
            sentences: of its data set, see `read_sentences`; assumed ones by default.

        Raises:
            ValueError: the configuration cannot be built, or its ranks share sequences, of which neither memory nor
                communication is modelled.
        """
        from ntpseg.models.model import NTPSegModel

        training = {"gradient_accumulation_steps": 1, **DEFAULTS, **config.training}
        if (shared := training.get("sequence_parallel_size", 1)) > 1:
            raise ValueError(f"training.sequence_parallel_size must be 1 for plans and scaling curves, got {shared}")
        sequence, made = sequence_format(config), model_config(config)
        with torch.device("meta"):
            model = NTPSegModel(made)
        image = None if sequence.image_grid is None else np.zeros(sequence.image_grid, np.int64)
        ids, labels = sequence.build([], image, np.zeros(sequence.mask_grid, np.int64))
        first, (low, high) = int((labels != -100).argmax()), sequence.vocabulary.supervised_range
        loss, settings = config.loss, config.model
        checkpointing = training.get("activation_checkpointing", training.get("gradient_checkpointing", False))
        return cls(
            preset=settings.preset,
            sizes=DecoderSizes.of(made),
            parameters=ParameterCounts.of(model),
            shape=ModelShape.of(model),
            flops=TrainingFlops.of(model),
            classes=high - low,
            vocabulary=made.vocab_size,
            heads=settings.k,
            hard_tokens=loss.hard_tokens if loss.het_weight else 0,
            supervised=int((labels != -100).sum()),
            tail=len(ids) - first + settings.k,
            fixed_tokens=len(ids),
            causal_tokens=sequence.num_target if made.prefix_lm else None,
            sentences=sentences or Sentences(),
            attention=settings.attention,
            micro_batch=int(training["per_device_train_batch_size"]),
            accumulation=int(training["gradient_accumulation_steps"]),
            checkpointing=bool(checkpointing),
            ema=bool(config.optimizer.ema),
        )

    @property
    def longest(self) -> int:
        """T, tokens of the longest sequence: memory is planned for it."""
        return self.fixed_tokens + self.sentences.longest

    @property
    def mean_tokens(self) -> float:
        """Tokens of a mean sequence: time is planned with it."""
        return self.fixed_tokens + self.sentences.mean

    def step_flops(self, samples: float) -> float:
        """Operations of so many sequences: forward and backward (PaLM, arXiv 2204.02311, appendix B)."""
        rows = [samples * self.supervised] * self.heads
        tokens = samples * self.mean_tokens
        return self.flops.step(tokens=tokens, squares=tokens * self.mean_tokens, rows=rows, images=samples)

    def recomputed_flops(self, samples: float) -> float:
        """What checkpointing adds for so many sequences: the decoder's forward pass once more."""
        tokens = samples * self.mean_tokens
        return (self.flops.token * tokens + self.flops.square * tokens * self.mean_tokens) / 3


def sequence_format(config: RunConfig) -> SequenceFormat:
    """The sequences of a configuration, with tokenizers of the sizes that it would train, or Emu3's own."""
    emu3 = config.layout == "emu3"
    return of_run.sequence_format(config, _vision(config), _Text(EMU3_TEXT_SIZE if emu3 else config.text.vocab_size))


def model_config(config: RunConfig) -> NTPSegConfig:
    """The model of a configuration, for the sequences of `sequence_format`."""
    return of_run.model_config(config, sequence_format(config), _vision(config))


@dataclass
class _Vision:
    """See `ntpseg.tokenizers.vision.VisionSizes`."""

    image_size: int
    channels: int
    factor: int
    image_grid: tuple[int, int]
    mask_grid: tuple[int, int]
    image_codes: int
    mask_codes: int
    shared_codebook: bool


def _vision(config: RunConfig) -> _Vision:
    names = ("factor", "image_codes", "mask_codes")
    options = CompactVQOptions(**{name: config.vision[name] for name in names if name in config.vision})
    size, factor, emu3 = config.data.size, options.factor, config.layout == "emu3"
    if size % factor:
        raise ValueError(f"data.size must be a multiple of vision.factor, {factor}, got {size}")
    codes = (EMU3_CODES, EMU3_CODES) if emu3 else (options.image_codes, options.mask_codes)
    grid = (size // factor, size // factor)
    return _Vision(size, config.data.channels, factor, grid, grid, *codes, shared_codebook=emu3)


class _Text:
    """Spells with one id a character, as Qwen's tokenizer does numbers."""

    def __init__(self, size: int) -> None:
        self.vocab_size = size

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [0] * len(text)
