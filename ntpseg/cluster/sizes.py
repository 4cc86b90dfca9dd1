"""Sizes of a model: its decoder's widths, and its numbers of weights by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ntpseg.models.config import NTPSegConfig
    from ntpseg.models.model import NTPSegModel


@dataclass(frozen=True)
class DecoderSizes:
    """Of the decoder.

    Attributes:
        hidden: D.
        intermediate: I, width of the MLPs.
        layers: how many.
        query_width, key_width: heads times the head's width, of queries and of keys (and values).
        query_heads, key_heads: their numbers.
        query_norm: queries and keys are normed (Qwen3).
    """

    hidden: int
    intermediate: int
    layers: int
    query_width: int
    key_width: int
    query_heads: int
    key_heads: int
    query_norm: bool

    @classmethod
    def of(cls, config: NTPSegConfig) -> DecoderSizes:
        """Of a model's configuration."""
        text = config.text_config
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            layers=text.num_hidden_layers,
            query_width=text.num_attention_heads * width,
            key_width=text.num_key_value_heads * width,
            query_heads=text.num_attention_heads,
            key_heads=text.num_key_value_heads,
            query_norm=text.model_type == "qwen3",
        )


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of weights by part.

    Attributes:
        embedding: of the tokens, ``V D``.
        layer: one layer of the decoder.
        layers: how many of them.
        head: the output matrix, ``V D``; 0 where it is the embedding.
        other: transforms of the later heads, the last norm, embeddings of grid cells, an image front end.
        transforms: of `other`, those of the later heads, which are a part of the module of the output matrix.
        largest: of the largest single weight.
        largest_of_layer: of the largest single weight of a layer.
    """

    embedding: int
    layer: int
    layers: int
    head: int
    other: int
    transforms: int
    largest: int
    largest_of_layer: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.layer * self.layers + self.head + self.other

    @classmethod
    def of(cls, model: NTPSegModel) -> ParameterCounts:
        """Of a model, on any device."""
        layers: Sequence[Any] = list(model.backbone.layers)
        sizes = {id(p): p.numel() for p in model.parameters()}
        layer = [p.numel() for p in layers[0].parameters()]
        embedding: Any = model.get_input_embeddings()
        head = 0 if model.heads.weight is embedding.weight else model.heads.weight.numel()
        return cls(
            embedding=embedding.weight.numel(),
            layer=sum(layer),
            layers=len(layers),
            head=head,
            other=sum(sizes.values()) - embedding.weight.numel() - head - sum(layer) * len(layers),
            transforms=sum(p.numel() for p in model.heads.parameters()) - model.heads.weight.numel(),
            largest=max(sizes.values()),
            largest_of_layer=max(layer),
        )
