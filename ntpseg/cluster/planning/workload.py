"""What a configuration trains: the model's sizes, parameters by part, sequences, operations of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ntpseg.models.flops import TrainingFlops
from ntpseg.models.model import NTPSegModel
from ntpseg.models.presets import preset_config
from ntpseg.tokenizers.sequence import SequenceFormat
from ntpseg.tokenizers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from ntpseg.models.config import NTPSegConfig
    from ntpseg.training.config import RunConfig

# Of a sentence, where no data set says it; a stated assumption of the plan.
TEXT_TOKENS = 32
# Emu3 spells a grid's size, such as 64*64, with so many text ids at most.
_SIZE_TOKENS = 5


@dataclass(frozen=True)
class Sentences:
    """The training pairs of a data set.

    Attributes:
        pairs: how many; None where no data set is known.
        mean, longest: text tokens of a sentence.
    """

    pairs: int | None = None
    mean: float = TEXT_TOKENS
    longest: int = TEXT_TOKENS


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights by part.

    Attributes:
        embedding: of the tokens, ``V D``.
        layer: one layer of the decoder.
        layers: how many of them.
        head: the output matrix, ``V D``; 0 where it is the embedding.
        other: transforms of the later heads, the last norm, embeddings of grid cells.
        largest: of the largest single weight.
        largest_of_layer: of the largest single weight of a layer.
    """

    embedding: int
    layer: int
    layers: int
    head: int
    other: int
    largest: int
    largest_of_layer: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.layer * self.layers + self.head + self.other

    @property
    def outside_layers(self) -> int:
        """Those that FSDP gathers with the root module."""
        return self.total - self.layer * self.layers


@dataclass(frozen=True)
class Workload:
    """A model and its sequences; what a plan is made of.

    Attributes:
        preset: of the model.
        hidden: D.
        intermediate: I, width of the MLPs.
        layers: of the decoder.
        query_width, key_width: heads times the head's width, of queries and of keys (and values).
        query_heads, key_heads: their numbers.
        query_norm: queries and keys are normed (Qwen3).
        vocabulary: V.
        classes: V', those that the loss's softmax runs over.
        heads: k.
        hard_tokens: kept per sample.
        supervised: labels of a sequence.
        tail: positions of a sequence that the heads read: from k before its first label on.
        fixed_tokens: tokens of a sequence without its text.
        sentences: text tokens and pairs.
        attention: its implementation; None: the device's default.
        flops: operations per unit.
        parameters: by part.
        samples_per_process, accumulation: per_device_train_batch_size and gradient_accumulation_steps.
        checkpointing: activation_checkpointing.
        ema: an average of the weights is kept.
    """

    preset: str
    hidden: int
    intermediate: int
    layers: int
    query_width: int
    key_width: int
    query_heads: int
    key_heads: int
    query_norm: bool
    vocabulary: int
    classes: int
    heads: int
    hard_tokens: int
    supervised: int
    tail: int
    fixed_tokens: int
    sentences: Sentences
    attention: str | None
    flops: TrainingFlops
    parameters: Parameters
    samples_per_process: int
    accumulation: int
    checkpointing: bool
    ema: bool

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


def workload(config: RunConfig, sentences: Sentences | None = None) -> Workload:
    """The workload of a run's configuration; nothing is read but the configuration, no weight is allocated.

    Args:
        config: the run's.
        sentences: of its data set; see `read_sentences`.

    Raises:
        ValueError: the configuration reads pixels by features, or trains with Muon, whose memory is not modelled.
    """
    if config.model.front_end != "codes":
        raise ValueError(f"model.front_end must be codes for a plan, got {config.model.front_end!r}")
    if config.optimizer.name != "adamw":
        raise ValueError(f"optimizer.name must be adamw for a plan, got {config.optimizer.name!r}")
    sequence = sequence_format(config)
    loss, settings = config.loss, config.model
    model_config = preset_config(
        settings.preset,
        sequence,
        overrides=settings.overrides,
        num_heads_k=settings.k,
        grid_positions=settings.grid_positions,
        negatives=loss.negatives,
        het_weight=loss.het_weight if loss.hard_tokens else 0.0,
    )
    with torch.device("meta"):
        model = NTPSegModel(model_config)
    sentences = sentences or Sentences()
    training = config.training
    checkpointing = training.get("activation_checkpointing", training.get("gradient_checkpointing", False))
    ids, labels = sequence.build([], *_blank_codes(sequence))
    first = int((labels != -100).argmax())
    return Workload(
        preset=settings.preset,
        **_text_sizes(model_config),
        vocabulary=model_config.vocab_size,
        classes=sequence.vocabulary.supervised_range[1] - sequence.vocabulary.supervised_range[0],
        heads=settings.k,
        hard_tokens=loss.hard_tokens if loss.het_weight else 0,
        supervised=int((labels != -100).sum()),
        tail=len(ids) - first + settings.k,
        fixed_tokens=len(ids),
        sentences=sentences,
        attention=settings.attention,
        flops=TrainingFlops.of(model),
        parameters=count_parameters(model),
        samples_per_process=int(training.get("per_device_train_batch_size", 16)),
        accumulation=int(training.get("gradient_accumulation_steps", 1)),
        checkpointing=bool(checkpointing),
        ema=bool(config.optimizer.ema),
    )


def sequence_format(config: RunConfig) -> SequenceFormat:
    """The sequences of a configuration, with the tokenizers that it would train (or Emu3's own)."""
    factor = int(config.vision.get("factor") or 8)
    if config.data.size % factor:
        raise ValueError(f"data.size must be a multiple of vision.factor, {factor}, got {config.data.size}")
    grid = (config.data.size // factor,) * 2
    if config.layout == "emu3":
        size = tuple(range(_SIZE_TOKENS))
        return SequenceFormat(Vocabulary.emu3(), grid, grid, "emu3", size, size)
    images, masks = config.vision.get("image_codes", 512), config.vision.get("mask_codes", 256)
    return SequenceFormat(Vocabulary(config.text.vocab_size, images, masks), grid, grid)


def read_sentences(config: RunConfig, data: str | Path) -> Sentences:
    """Number and lengths of a data set's training pairs; no image is opened.

    Raises:
        ntpseg.data.DataProblems: the data set is not in order.
        FileNotFoundError, ValueError: it is none, or has no training pair.
    """
    from ntpseg.data import load_records
    from ntpseg.tokenizers.text import load_text_tokenizer, train_text_tokenizer

    records = load_records(data, config.data.layout, skip_bad=config.data.skip_bad)
    texts = [record.text for record in records if record.split == "train"]
    if not texts:
        raise ValueError(f"data must hold a pair of the training split, got none in {data}")
    if config.text.path is not None:
        tokenizer: Any = load_text_tokenizer(Path(config.text.path).expanduser())
    else:
        tokenizer = train_text_tokenizer(texts, max(config.text.vocab_size, 257))
    length = {text: len(tokenizer.encode(text, add_special_tokens=False)) for text in set(texts)}
    lengths = [length[text] for text in texts]
    return Sentences(len(texts), sum(lengths) / len(lengths), max(lengths))


def count_parameters(model: NTPSegModel) -> Parameters:
    """Numbers of weights by part of a model, on any device."""
    layers: Sequence[Any] = list(model.backbone.layers)
    sizes = {id(p): p.numel() for p in model.parameters()}
    layer = [p.numel() for p in layers[0].parameters()]
    embedding: Any = model.get_input_embeddings()
    head = 0 if model.heads.weight is embedding.weight else model.heads.weight.numel()
    return Parameters(
        embedding=embedding.weight.numel(),
        layer=sum(layer),
        layers=len(layers),
        head=head,
        other=sum(sizes.values()) - embedding.weight.numel() - head - sum(layer) * len(layers),
        largest=max(sizes.values()),
        largest_of_layer=max(layer),
    )


def _text_sizes(config: NTPSegConfig) -> dict[str, Any]:
    text = config.text_config
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return {
        "hidden": text.hidden_size,
        "intermediate": text.intermediate_size,
        "layers": text.num_hidden_layers,
        "query_width": text.num_attention_heads * width,
        "key_width": text.num_key_value_heads * width,
        "query_heads": text.num_attention_heads,
        "key_heads": text.num_key_value_heads,
        "query_norm": text.model_type == "qwen3",
    }


def _blank_codes(sequence: SequenceFormat) -> tuple[Any, Any]:
    import numpy as np

    image = None if sequence.image_grid is None else np.zeros(sequence.image_grid, np.int64)
    return image, np.zeros(sequence.mask_grid, np.int64)
