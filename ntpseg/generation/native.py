"""`NativeDecoder`: inference of a Llama-like backbone with fused projections and a static cache.

For the small models that run on a CPU most of the time of `HuggingFaceDecoder` is Python and cache copies, not
arithmetic. The result is the same (tests compare them); what is not covered here runs there instead.

Prompts of different lengths stand at the left of their rows and every row decodes at its own position, so a causal mask
is all that the prompts need and a row's result does not depend on what it was batched with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntpseg.generation.attention import KeyValueCache, prompt_attention, step_attention, visible_slots
from ntpseg.generation.decoder import PromptBatch
from ntpseg.generation.static_step import StaticStep

SUPPORTED = ("llama", "qwen2", "qwen3")
# Frequencies of these depend on the position alone, so one table serves the whole sequence.
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
# Slots are reserved in multiples of it.
CAPACITY_STEP = 32
# The fused projections are copies; beyond this size they would cost more memory than they save time.
MAX_PARAMETERS = 2_000_000_000


def unsupported_reason(backbone: nn.Module) -> str | None:
    """Why `NativeDecoder` cannot run this Hugging Face backbone, or None if it can."""
    config: Any = backbone.config
    if config.model_type not in SUPPORTED:
        return f"model_type {config.model_type!r} is not one of {', '.join(SUPPORTED)}"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"layer_types {sorted(kinds)} are not full_attention alone"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in STATIC_ROPE:
        return f"rope_type {rope!r} is not one of {', '.join(STATIC_ROPE)}"
    if any(p.numel() == 0 for p in backbone.parameters()):
        return "its parameters are partitioned over ranks"
    size = sum(p.numel() for p in backbone.parameters())
    if size > MAX_PARAMETERS:
        return f"{size:,} parameters are more than {MAX_PARAMETERS:,}, too many to hold twice"
    return None


def _fuse(layers: list[nn.Linear], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    weights: list[Tensor] = [layer.weight.detach() for layer in layers]
    weight = torch.cat(weights).to(dtype)
    if all(layer.bias is None for layer in layers):
        return weight, None
    biases: list[Tensor] = [
        layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach() for layer in layers
    ]
    return weight, torch.cat(biases).to(dtype)


class _Layer:
    def __init__(self, layer: Any, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = _fuse([attention.q_proj, attention.k_proj, attention.v_proj], dtype)
        self.out = _fuse([attention.o_proj], dtype)
        self.gate_up = _fuse([mlp.gate_proj, mlp.up_proj], dtype)
        self.down = _fuse([mlp.down_proj], dtype)
        self.activation = mlp.act_fn
        self.norm_in, self.norm_out = (
            layer.input_layernorm.weight.float(),
            layer.post_attention_layernorm.weight.float(),
        )
        self.norm_qk: Tensor | None = None
        if hasattr(attention, "q_norm"):
            parts = [attention.q_norm.weight.expand(heads, -1), attention.k_norm.weight.expand(kv_heads, -1)]
            self.norm_qk = torch.cat(parts).float()
        # That of the largest batch there was, and the current batch's part of it.
        self.memory: KeyValueCache
        self.cache: KeyValueCache


class _Embedding:
    """Token embedding plus the grid's, whose table is computed once instead of at every token, and the stem's."""

    def __init__(self, model: Any) -> None:
        self.front_end = model.front_end
        self.tokens = model.get_input_embeddings().weight.detach()
        self.query = model.config.query_token
        self.table = None if model.grid is None else model.grid.table()

    def __call__(self, ids: Tensor, grid_ids: Tensor, features: Tensor | None) -> Tensor:
        embeds = F.embedding(ids, self.tokens).float()
        if self.table is not None:
            # The table's last row belongs to the token before the mask.
            last = self.table.shape[0] - 1
            embeds = embeds + F.embedding(torch.where(ids == self.query, last, grid_ids), self.table).float()
        if self.front_end is not None:
            assert features is not None
            embeds = self.front_end.inject(embeds, features, ids, grid_ids)
        return embeds


class NativeDecoder:
    """A `RewindableDecoder` for an `NTPSegModel` whose backbone is of the Llama, Qwen2 or Qwen3 family.

    The residual stream and the norms are float32; matrix products, keys and values are in `dtype`, as autocast does in
    training.

    Args:
        model: an `NTPSegModel`; its backbone's weights are copied, so later training does not show here.
        dtype: of the matrix products.
        static: one token per row is read by a `StaticStep`; by default on a GPU, where that is a CUDA graph.

    Raises:
        ValueError: if `unsupported_reason` gives one.
    """

    def __init__(self, model: Any, dtype: torch.dtype, static: bool | None = None) -> None:
        backbone = model.backbone
        reason = unsupported_reason(backbone)
        if reason is not None:
            raise ValueError(f"model must be one that NativeDecoder supports, got one where {reason}")
        config = backbone.config
        self.dtype, self.epsilon = dtype, config.rms_norm_eps
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.layers = [_Layer(layer, self.heads, self.kv_heads, dtype) for layer in backbone.layers]
        self.norm, self.rotary = backbone.norm.weight.float(), backbone.rotary_emb
        self.embed = _Embedding(model)
        self.prefix_lm = model.config.prefix_lm
        self.device = self.norm.device
        self.static = self.device.type == "cuda" if static is None else static
        self.most_rows = self.capacity = 0
        self.feature_memory: Tensor | None = None
        self.steps: dict[int, StaticStep] = {}

    # What outlives a call must not be an inference tensor, which cannot be written outside of that mode.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _reserve(self, batch: int, capacity: int, features: Tensor | None) -> None:
        """Memory for this batch; what is there already stays in place where it is large enough."""
        if batch > self.most_rows or capacity > self.capacity:
            self.most_rows, self.capacity = max(batch, self.most_rows), max(capacity, self.capacity)
            # Prompts differ by a few tokens.
            self.capacity = -(-self.capacity // CAPACITY_STEP) * CAPACITY_STEP
            self.steps.clear()
            positions = torch.arange(self.capacity, device=self.device)[None]
            cos, sin = self.rotary(torch.zeros(1, device=self.device), positions)
            half = self.head_dim // 2
            self.cos = cos[0, :, None].to(self.dtype)
            # rotate_half(x) * sin == roll(x) * sin with the first half's sign turned.
            self.sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)[:, None].to(self.dtype)
            like = torch.empty(0, dtype=self.dtype, device=self.device)
            for layer in self.layers:
                # The old memory goes first, or both would be held for a moment.
                layer.memory = layer.cache = None  # type: ignore[assignment]
                layer.memory = KeyValueCache(self.most_rows, self.kv_heads, self.capacity, self.head_dim, like)
        for layer in self.layers:
            layer.cache = layer.memory.emptied(batch)
        self.features = features
        if features is not None and self.static:
            held = self.feature_memory
            if held is None or len(held) < self.most_rows:
                self.steps.clear()
                held = self.feature_memory = features.new_zeros(self.most_rows, *features.shape[1:])
            self.features = held[:batch].copy_(features)

    def _static_step(self, batch: int) -> StaticStep:
        """The step of `batch` rows over all slots: which of them are filled is known on the device alone."""
        step = self.steps.get(batch)
        if step is not None:
            return step
        rows = torch.arange(batch, device=self.device)[:, None]
        features = self.features

        def function(tokens: Tensor, grid_ids: Tensor, positions: Tensor) -> Tensor:
            slots = positions[:, None]
            visible = visible_slots(slots, self.capacity)

            def attend(layer: _Layer, query: Tensor, key_value: Tensor) -> Tensor:
                layer.cache.scatter(rows, slots, key_value)
                return step_attention(query, *layer.cache.read(self.capacity), visible)

            hidden = self.embed(tokens, grid_ids, features)
            return self._final_norm(self._run(hidden, self.cos[slots], self.sin[slots], attend))

        step = self.steps[batch] = StaticStep(function, batch, self.device)
        return step

    def start(self, prompts: PromptBatch, capacity: int) -> Tensor:
        """See `Decoder.start`."""
        return self._start(prompts, capacity, 0)[:, 0]

    def start_with(self, prompts: PromptBatch, capacity: int, tokens: Tensor, grid_ids: Tensor) -> Tensor:
        """See `RewindableDecoder.start_with`."""
        ids = [torch.cat([prompt, more]) for prompt, more in zip(prompts.ids, tokens)]
        cells = [torch.cat([prompt, more]) for prompt, more in zip(prompts.grid_ids, grid_ids)]
        return self._start(PromptBatch(ids, cells, prompts.stem), capacity, tokens.shape[1])

    def _start(self, prompts: PromptBatch, capacity: int, more: int) -> Tensor:
        """Read sequences that end in `more` tokens that are no prompt: ``[B, more + 1, D]``, see `start_with`."""
        batch, device = len(prompts), self.device
        self.lengths = torch.tensor([len(ids) for ids in prompts.ids], device=device)
        self.longest = prompts.max_length
        # While all rows stand at one position no mask and no scattered write is needed.
        self.uniform = min(map(len, prompts.ids)) == self.longest
        self.rows = torch.arange(batch, device=device)[:, None]
        self._reserve(batch, capacity, None if prompts.stem is None else prompts.stem.features)
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad(prompts.ids, batch_first=True).to(device)
        hidden = self.embed(ids, pad(prompts.grid_ids, batch_first=True).to(device), self.features)
        visible = None
        if self.prefix_lm:
            # All of a prompt sees all of it, but neither the padding nor, where more is read, what follows.
            slots = torch.arange(self.longest, device=device)
            visible = (slots < (self.lengths - more)[:, None])[:, None, None]
            if more:
                visible = visible | (slots <= slots[:, None])

        def attend(layer: _Layer, query: Tensor, key_value: Tensor) -> Tensor:
            layer.cache.write(0, key_value)
            key, value = key_value[:, :, : self.kv_heads], key_value[:, :, self.kv_heads :]
            return prompt_attention(query, key, value, visible)

        hidden = self._run(hidden, self.cos[: self.longest], self.sin[: self.longest], attend)
        last = self.lengths[:, None] - 1 - torch.arange(more, -1, -1, device=device)
        return self._final_norm(hidden[self.rows, last])

    def extend(self, tokens: Tensor, grid_ids: Tensor) -> Tensor:
        """See `Decoder.extend`."""
        new = tokens.shape[1]
        end = self.longest + new
        if self.static and new == 1:
            hidden = self._static_step(len(tokens))(tokens, grid_ids, self.lengths)
            self.lengths, self.longest = self.lengths + 1, end
            return hidden
        visible = positions = None
        if self.uniform:
            cos, sin = self.cos[self.longest : end], self.sin[self.longest : end]
            if new > 1:
                visible = visible_slots(torch.arange(self.longest, end, device=self.device)[None], end)
        else:
            positions = self.lengths[:, None] + torch.arange(new, device=self.device)
            cos, sin = self.cos[positions], self.sin[positions]
            visible = visible_slots(positions, end)

        def attend(layer: _Layer, query: Tensor, key_value: Tensor) -> Tensor:
            if positions is None:
                layer.cache.write(end - new, key_value)
            else:
                layer.cache.scatter(self.rows, positions, key_value)
            return step_attention(query, *layer.cache.read(end), visible)

        hidden = self._run(self.embed(tokens, grid_ids, self.features), cos, sin, attend)
        self.lengths = self.lengths + new
        self.longest = end
        return self._final_norm(hidden)

    def extend_ragged(self, counts: Sequence[int], tokens: Tensor, grid_ids: Tensor) -> Tensor:
        """See `RewindableDecoder.extend_ragged`. Only attention is padded; the products see the tokens alone."""
        number = np.asarray(counts, np.int64)
        before = self.lengths.cpu().numpy()
        active = np.flatnonzero(number)
        row = np.repeat(np.arange(len(number)), number)
        place = np.arange(len(row)) - np.repeat(number.cumsum() - number, number)
        most, end = int(number.max()), int((before + number)[active].max())
        index = np.stack([row, place, before[row] + place, np.searchsorted(active, row)])
        rows, places, positions, padded_rows = torch.from_numpy(index).to(self.device)
        everyone = len(active) == len(number)
        chosen = None if everyone else torch.from_numpy(active).to(self.device)
        shape = (len(active), most)
        square = len(row) == len(active) * most

        def pad(flat: Tensor) -> Tensor:
            """``[N, ...]`` to ``[active rows, most, ...]``."""
            if square:
                return flat.view(*shape, *flat.shape[1:])
            padded = flat.new_zeros(*shape, *flat.shape[1:])
            padded[padded_rows, places] = flat
            return padded

        def flatten(padded: Tensor) -> Tensor:
            return (padded.flatten(0, 1) if square else padded[padded_rows, places])[None]

        features = self.features
        if features is not None and chosen is not None:
            features = features[chosen]
        visible = visible_slots(pad(positions), end)

        def attend(layer: _Layer, query: Tensor, key_value: Tensor) -> Tensor:
            layer.cache.scatter(rows, positions, key_value[0])
            key, value = layer.cache.read(end, chosen)
            return flatten(step_attention(pad(query[0]), key, value, visible))

        hidden = flatten(self.embed(pad(tokens), pad(grid_ids), features))
        hidden = self._run(hidden, self.cos[positions], self.sin[positions], attend)
        self._set_lengths(self.lengths + torch.from_numpy(number).to(self.device))
        return self._final_norm(hidden[0])

    def rewind(self, tokens: Tensor) -> None:
        """See `RewindableDecoder.rewind`."""
        self._set_lengths(self.lengths - tokens)

    def _set_lengths(self, lengths: Tensor) -> None:
        self.lengths = lengths
        low, high = torch.aminmax(lengths)
        self.longest, self.uniform = int(high), int(low) == int(high)

    def repeat(self, times: int) -> None:
        """See `Decoder.repeat`."""
        before = [layer.cache.buffer.clone() for layer in self.layers]
        features = None if self.features is None else self.features.repeat(times, 1, 1)
        self.lengths = self.lengths.repeat(times)
        self.rows = torch.arange(len(self.lengths), device=self.device)[:, None]
        # Steps in fixed memory read there and nowhere else.
        self._reserve(len(self.lengths), self.capacity, features)
        for layer, buffer in zip(self.layers, before):
            layer.cache.buffer.view(times, *buffer.shape).copy_(buffer)

    def _final_norm(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, self.norm.shape, self.norm, self.epsilon)

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, weight.shape, weight, self.epsilon).to(self.dtype)

    def _run(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Callable[[_Layer, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """All layers on ``[B, q, D]``.

        Args:
            hidden: the embeddings.
            cos, sin: of the tokens' positions, ``[q or B, q, 1, head_dim]``.
            attend: of a layer, queries ``[B, q, heads, head_dim]`` and keys and values ``[B, q, 2 * kv_heads,
                head_dim]``, which it caches: ``[B, q, heads * head_dim]``.
        """
        batch, new = hidden.shape[:2]
        rotated = self.heads + self.kv_heads
        for layer in self.layers:
            qkv = F.linear(self._normed(hidden, layer.norm_in), *layer.qkv).view(batch, new, -1, self.head_dim)
            query_key = qkv[:, :, :rotated]
            if layer.norm_qk is not None:
                query_key = F.rms_norm(query_key.float(), (self.head_dim,), None, self.epsilon)
                query_key = (query_key * layer.norm_qk).to(self.dtype)
            rotation = query_key.roll(self.head_dim // 2, -1)
            qkv[:, :, :rotated] = torch.addcmul(query_key * cos, rotation, sin)
            attended = attend(layer, qkv[:, :, : self.heads], qkv[:, :, self.heads :])
            hidden = hidden + F.linear(attended, *layer.out)
            gate, up = F.linear(self._normed(hidden, layer.norm_out), *layer.gate_up).chunk(2, -1)
            hidden = hidden + F.linear(layer.activation(gate) * up, *layer.down)
        return hidden
