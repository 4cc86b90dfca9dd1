"""A model's parameters in the order in which a training step uses them; that order decides buckets and prefetching."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

# As a decoder layer runs, itself first; Hugging Face declares its norms last.
_LAYER_ORDER = (
    "",
    "input_layernorm",
    "self_attn",
    "self_attn.q_proj",
    "self_attn.q_norm",
    "self_attn.k_proj",
    "self_attn.k_norm",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp",
    "mlp.gate_proj",
    "mlp.act_fn",
    "mlp.up_proj",
    "mlp.down_proj",
)
_LAYER = re.compile(r"backbone\.layers\.(\d+)\.?(.*)")
# Where a module that is no decoder layer runs; the model itself has the empty name.
_BEFORE = ("backbone.embed_tokens", "grid", "front_end", "backbone", "backbone.rotary_emb")
_AFTER = ("backbone.norm", "heads", "readout")
# A head uses its transforms before its output matrix, which it declares first.
_HEADS = ("transform_weight", "transform_bias", "weight")


@dataclass(frozen=True)
class Parameter:
    """A parameter.

    Attributes:
        name: as in ``named_parameters``.
        shape: of the whole tensor.
        place: index among all parameters, in the order of ``named_parameters``.
        decayed: the optimizer decays it, hence it is in the optimizer's first group.
        trainable: it has a gradient.
    """

    name: str
    shape: tuple[int, ...]
    place: int
    decayed: bool
    trainable: bool = True

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Module:
    """A module that is called: one that owns parameters, or one around or between those, without any.

    Attributes:
        name: as in ``named_modules``, empty for the model itself.
        parameters: its own, not those of modules inside it, in the order of their use.
        layer: index of the decoder layer that it is in; None elsewhere.
    """

    name: str
    parameters: tuple[Parameter, ...]
    layer: int | None


@dataclass(frozen=True)
class ModelShape:
    """What communication depends on.

    Attributes:
        modules: in the order in which a forward pass begins them.
        hidden_size: D; Hugging Face derives DeepSpeed's bucket sizes from it.
        heads: k.
        terms: terms of the loss that training logs.
        buffer_bytes: bytes of the buffers of each dtype, which DDP sends at each step.
    """

    modules: tuple[Module, ...]
    hidden_size: int
    heads: int
    terms: int
    buffer_bytes: tuple[int, ...]

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """Each once, in the order of their first use; a tied matrix where the embedding is."""
        return tuple(dict.fromkeys(p for module in self.modules for p in module.parameters))

    @property
    def numel(self) -> int:
        """Number of elements of all parameters."""
        return sum(p.numel for p in self.parameters)

    @property
    def gradient_order(self) -> tuple[Parameter, ...]:
        """The trainable ones, as backward finishes them."""
        return tuple(p for p in reversed(self.parameters) if p.trainable)

    @property
    def optimizer_groups(self) -> tuple[tuple[Parameter, ...], ...]:
        """The trainable ones as the Trainer's AdamW groups them: decayed, then the others; no empty group."""
        ordered = sorted((p for p in self.parameters if p.trainable), key=lambda p: p.place)
        groups = (tuple(p for p in ordered if p.decayed), tuple(p for p in ordered if not p.decayed))
        return tuple(group for group in groups if group)

    @classmethod
    def of(cls, model: Any) -> ModelShape:
        """Of an `NTPSegModel`, which may lie on the meta device (its weights must be whole)."""
        from transformers import Trainer

        decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # reads no trainer
        found: dict[int, Parameter] = {}
        for place, (name, tensor) in enumerate(model.named_parameters()):
            found[id(tensor)] = Parameter(name, tuple(tensor.shape), place, name in decayed, tensor.requires_grad)
        modules = []
        for name, module in model.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if name == "heads":
                own = {key: own[key] for key in _HEADS if key in own}
            layer = _LAYER.fullmatch(name)
            between = name in ("", "backbone", "backbone.rotary_emb") or (layer and layer[2] in _LAYER_ORDER)
            if own or between:
                parameters = tuple(found[id(tensor)] for tensor in own.values())
                modules.append(Module(name, parameters, int(layer[1]) if layer else None))
        buffers: dict[torch.dtype, int] = {}
        for buffer in model.buffers():
            buffers[buffer.dtype] = buffers.get(buffer.dtype, 0) + buffer.numel() * buffer.element_size()
        config = model.config
        dense = config.dense_loss or {}
        return cls(
            modules=tuple(sorted(modules, key=_run_order)),
            hidden_size=config.hidden_size,
            heads=config.num_heads_k,
            terms=4 + sum(bool(dense.get(name)) for name in ("dice", "pixel", "soft")),
            buffer_bytes=tuple(buffers.values()),
        )


def _run_order(module: Module) -> tuple[int, int, int]:
    """Sorting key; modules of one place stay in the order of their declaration."""
    if not module.name:
        return -1, 0, 0
    layer = _LAYER.fullmatch(module.name)
    if layer:
        inside = _LAYER_ORDER.index(layer[2]) if layer[2] in _LAYER_ORDER else len(_LAYER_ORDER)
        return 1, int(layer[1]), inside
    for place, names in ((0, _BEFORE), (2, _AFTER)):
        for index, name in enumerate(names):
            inside = name != "backbone" and module.name.startswith(f"{name}.")
            if module.name == name or inside:
                return place, index, 0
    return 0, len(_BEFORE), 0
