"""Prefix language models: the prompt sees itself in both directions, mask tokens see what is before them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from ntpseg.models import causal_blocks
from ntpseg.models.packing import PackedRows
from ntpseg.models.prefix import prefix_mask, prompt_lengths


def dense(lengths: list[int], total: int, keep: torch.Tensor | None = None) -> torch.Tensor:
    """Bool [B, T, T], by the definition."""
    mask = torch.zeros(len(lengths), total, total, dtype=torch.bool)
    for row, length in enumerate(lengths):
        for query in range(total):
            for key in range(total):
                seen = key <= query or (query < length and key < length)
                mask[row, query, key] = seen and (keep is None or bool(keep[row, key]))
    return mask


@pytest.mark.parametrize("attention", ["sdpa", "eager", "causal_blocks"])
@pytest.mark.parametrize("padded", [False, True])
def test_mask_equals_the_definition(make_feature_model, attention, padded) -> None:
    model, _ = make_feature_model(attention=attention)
    lengths, keep = [3, 7, 0], None
    if padded:
        keep = torch.ones(3, 7, dtype=torch.long)
        keep[0, :2] = 0
    got = prefix_mask(model.backbone.config, torch.zeros(3, 7, 32), keep, torch.tensor(lengths))
    seen = got[:, 0] if got.dtype == torch.bool else got[:, 0] == 0
    expected = dense(lengths, 7, keep)
    # What a padding token itself sees does not matter, and differs between implementations.
    rows = torch.ones(3, 7, dtype=torch.bool) if keep is None else keep.bool()
    assert torch.equal(seen[rows], expected[rows])


@pytest.mark.parametrize("front_end", ["codes", "features"])
def test_attention_implementations_agree(make_feature_model, feature_batch, front_end) -> None:
    states = []
    for attention in ("sdpa", "eager", "causal_blocks"):
        model, sequence = make_feature_model(front_end, prefix_lm=True, attention=attention)
        assert model.backbone.config._attn_implementation == attention
        torch.manual_seed(2)
        batch = feature_batch(sequence)
        pixels = batch["pixel_values"] if front_end == "features" else None
        with torch.no_grad():
            out = model.eval()(batch["input_ids"], grid_ids=batch["grid_ids"], pixel_values=pixels)
        states.append(out.last_hidden_state[batch["input_ids"] != sequence.vocabulary.pad])
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states[2], states[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("block", [False, True])
def test_blocks_of_queries_read_the_prompts_lengths(
    make_feature_model, feature_batch, monkeypatch, packed, block
) -> None:
    """Prompts of several lengths, with gradients; the short sequences of the test are served by either way."""
    monkeypatch.setattr(causal_blocks, "MIN_TOKENS", 1 if block else 1000)
    monkeypatch.setattr(causal_blocks, "BLOCK", 8)
    calls: list[list[int]] = []
    inner = causal_blocks.causal_blocks
    monkeypatch.setattr(
        causal_blocks,
        "causal_blocks",
        lambda *a, prefix, **k: (calls.append(prefix.tolist()), inner(*a, prefix=prefix, **k))[1],
    )
    results = []
    for attention in ("eager", "causal_blocks"):
        model, sequence = make_feature_model("codes", prefix_lm=True, attention=attention)
        model.eval()
        torch.manual_seed(2)
        batch = feature_batch(sequence)
        ids, grid = batch["input_ids"], batch["grid_ids"]
        lengths = [int((row != sequence.vocabulary.pad).sum()) for row in ids]
        packing = PackedRows.plan(lengths, 2 * max(lengths), ids.shape[1]).tensors() if packed else None
        out = model(ids, labels=batch["labels"], grid_ids=grid, packing=packing)
        gradients = torch.autograd.grad(out.loss, list(model.backbone.layers.parameters()))
        results.append((out.last_hidden_state[ids != sequence.vocabulary.pad], out.loss, *gradients))
    for got, true in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-5)
    prompts = prompt_lengths(grid, 9).tolist()
    assert bool(calls) == block
    if block and not packed:
        assert calls[0] == prompts
    elif block:
        assert sorted(n for (n,) in calls[: len(calls) // len(model.backbone.layers)] if n) == sorted(prompts)


@pytest.mark.parametrize("prefix", [False, True])
def test_who_sees_whom(make_feature_model, feature_batch, prefix) -> None:
    model, sequence = make_feature_model("codes", prefix_lm=prefix)
    model.eval()
    batch = feature_batch(sequence, (4, 2))
    ids, grid = batch["input_ids"], batch["grid_ids"]
    prompt = prompt_lengths(grid, 9)
    assert prompt.tolist() == [int((row != -100).int().argmax()) for row in batch["labels"]]

    def changed_positions(row: int, position: int, token: int) -> set[int]:
        other = ids.clone()
        other[row, position] = token
        with torch.no_grad():
            a, b = (model(x, grid_ids=grid).last_hidden_state for x in (ids, other))
        different = (a - b).abs().amax(2) > 1e-6
        assert not different[1 - row].any()
        return set(different[row].nonzero()[:, 0].tolist())

    total, low = ids.shape[1], sequence.vocabulary.mask_range[0]
    late = int(prompt[0]) - 3  # an image code near the prompt's end
    token = int(ids[0, late]) ^ 1
    first = 0 if prefix else late
    assert changed_positions(0, late, token) == set(range(first, total))
    masked = int(prompt[0]) + 4
    assert changed_positions(0, masked, low + (int(ids[0, masked]) - low + 1) % 8) == set(range(masked, total))
    # A row whose prompt is shorter than the batch's longest: its mask tokens are causal as well.
    masked = int(prompt[1]) + 1
    assert masked < int(prompt[0])
    assert min(changed_positions(1, masked, low + (int(ids[1, masked]) - low + 1) % 8)) == masked


def test_cached_decoding_equals_one_pass(make_feature_model, feature_batch) -> None:
    model, sequence = make_feature_model(prefix_lm=True)
    model.eval()
    batch = feature_batch(sequence, (4,))
    ids, grid = batch["input_ids"], batch["grid_ids"]
    start = int(prompt_lengths(grid, 0)[0])
    with torch.no_grad():
        stem = model.encode_image(batch["pixel_values"], ids)
        whole = model(ids, grid_ids=grid, stem_output=stem).last_hidden_state
        out = model(ids[:, :start], grid_ids=grid[:, :start], stem_output=stem, use_cache=True)
        states = [out.last_hidden_state]
        for i, j in ((start, start + 1), (start + 1, start + 5), (start + 5, ids.shape[1])):
            out = model(ids[:, i:j], grid_ids=grid[:, i:j], stem_output=stem, past_key_values=out.cache, use_cache=True)
            states.append(out.last_hidden_state)
    torch.testing.assert_close(torch.cat(states, 1), whole, rtol=1e-4, atol=1e-5)
    assert isinstance(out.cache, DynamicCache)


def test_prompt_lengths() -> None:
    grid = torch.tensor([[0, 1, 2, 0, 3, 4, 0], [0, 1, 2, 0, 0, 0, 0], [3, 4, 0, 0, 0, 0, 0]])
    assert prompt_lengths(grid, 2).tolist() == [4, 7, 0]


def test_wrong_input_is_named(make_feature_model, feature_batch) -> None:
    config = SimpleNamespace(_attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match=r"attention must be sdpa, .* with prefix_lm, got 'flash_attention_2'"):
        prefix_mask(config, torch.zeros(1, 3, 4), None, torch.tensor([2]))
    model, sequence = make_feature_model("codes", prefix_lm=True, grid_positions=False)
    batch = feature_batch(sequence)
    with pytest.raises(ValueError, match=r"grid_ids must be \[3, 28\], as input_ids is, with prefix_lm, got None"):
        model(batch["input_ids"])
