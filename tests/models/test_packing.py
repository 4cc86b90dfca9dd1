"""Packed rows: the plan, and a model whose loss and gradient are those of the padded batch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from ntpseg.models.packing import PackedRows


@pytest.mark.parametrize(
    ("lengths", "row_length", "rows"),
    [
        ([3, 5, 2], 8, 2),
        ([3, 5, 2], 10, 1),
        ([4], 4, 1),
        ([4], 11, 1),
        ([7, 1, 1, 1], 2, 2),
        ([2, 2, 2], 1, 3),
        ([9] * 7, 60, 2),
    ],
)
def test_plan_holds_every_token_once(lengths: list[int], row_length: int, rows: int) -> None:
    packed, width = PackedRows.plan(lengths, row_length), max(lengths)
    assert packed.source.shape[0] == rows
    assert max(lengths) <= packed.source.shape[1] <= max(row_length, width)
    assert packed.source.shape[1] < -(-sum(lengths) // rows) + max(lengths) + 8
    tokens = torch.arange(1, len(lengths) * width + 1).view(len(lengths), width)
    back = packed.unpack(packed.pack(tokens))
    for sample, length in enumerate(lengths):
        assert torch.equal(back[sample, :length], tokens[sample, :length])
        assert (back[sample, length:] == tokens[sample, length - 1]).all()
    filled = packed.source[packed.source >= 0]
    assert len(filled) == len(set(filled.tolist())) == sum(lengths)
    assert packed.sample[packed.source >= 0].bincount().tolist() == lengths
    # Every piece between two bounds is one sequence of positions 0, 1, 2, ... in one row.
    flat, samples = packed.position.flatten(), packed.sample.flatten()
    bounds = packed.bounds.tolist()
    assert bounds[0] == 0 and bounds[-1] == flat.numel()
    for start, stop in itertools.pairwise(bounds):
        assert 0 < stop - start <= width and flat[start:stop].tolist() == list(range(stop - start))
        assert samples[start:stop].unique().numel() == 1
        assert start // packed.source.shape[1] == (stop - 1) // packed.source.shape[1]


def test_rows_are_filled_evenly() -> None:
    """Four rows of up to 500 hold these; a fourth one that is nearly empty would be padding."""
    lengths = [250, 240, 230, 220, 210, 200, 190, 60]
    assert list(PackedRows.plan(lengths, 500).source.shape) == [4, 432]
    assert list(PackedRows.plan(lengths, 10_000).source.shape) == [1, 1600]


@pytest.mark.parametrize(("lengths", "row_length"), [([], 4), ([0, 2], 4), ([3], 0), ([3], True)])
def test_plan_refuses(lengths: list[int], row_length: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        PackedRows.plan(lengths, row_length)


def lengths_of(batch: dict[str, Any]) -> list[int]:
    """Tokens of each row up to its last label."""
    return [int((row != -100).nonzero().max()) + 1 for row in batch["labels"]]


def loss_and_gradient(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    model.zero_grad()
    torch.manual_seed(5)  # of what is drawn in place of mask tokens
    out = model(**batch)
    out.loss.backward()
    values = {name: out[name] for name in ("loss", "ntp", "nktp", "tcl", "het", "prediction", "nll", "margin")}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"values": values, "gradients": gradients}


def assert_same(model: Any, batch: dict[str, Any], row_lengths: tuple[int, ...], tolerance: float = 1e-10) -> None:
    whole = loss_and_gradient(model, batch)
    for row_length in row_lengths:
        packed = PackedRows.plan(lengths_of(batch), row_length, batch["labels"].shape[1])
        other = loss_and_gradient(model, {**batch, "packing": packed.tensors()})
        torch.testing.assert_close(other, whole, rtol=tolerance, atol=tolerance)


@pytest.fixture
def hard_tokens(batch) -> dict[str, torch.Tensor]:
    """At the first and the last label of each row, where a packed neighbour would be one token away."""
    supervised = batch["labels"] != -100
    first = supervised.int().argmax(1)
    last = torch.tensor(lengths_of(batch)) - 1
    position = torch.stack([first, last], 1)
    label = batch["labels"].gather(1, position)
    low = int(batch["labels"][supervised].min())
    return {"het_position": position, "het_token": torch.where(label == low, low + 1, low)}


@pytest.mark.parametrize("attention", ["sdpa", "eager", "causal_blocks"])
def test_loss_and_gradient_are_those_of_the_batch(make_model, batch, hard_tokens, attention) -> None:
    """k heads, negatives and hard tokens included: none of them crosses from one sequence into the next."""
    model = make_model(negatives=5).double().train()
    model.set_attn_implementation(attention)
    whole = loss_and_gradient(model, {**batch, **hard_tokens})
    assert whole["values"]["het"] > 0 and whole["values"]["tcl"] > 0
    longest = batch["labels"].shape[1]
    # Hugging Face's eager attention takes its softmax in float32.
    tolerance = 1e-6 if attention == "eager" else 1e-10
    assert_same(model, {**batch, **hard_tokens}, (1, longest + 3, 2 * longest, 200), tolerance)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "causal_blocks"])
@pytest.mark.parametrize("front_end", ["codes", "features", "both"])
def test_prefix_stem_and_losses_on_pixels(make_feature_model, feature_batch, front_end, attention) -> None:
    pixel = 0.0 if front_end == "codes" else 0.5
    model, sequence = make_feature_model(
        front_end,
        attention=attention,
        prefix_lm=True,
        negatives=3,
        num_heads_k=2,
        dense_loss={"dice": 0.5, "pixel": pixel, "soft": 0.25},
        mask_inputs={"second_pass": 0.5},
    )
    model.double().train()
    batch = feature_batch(sequence)
    if front_end == "codes":
        del batch["pixel_values"]
    else:
        batch["pixel_values"] = batch["pixel_values"].double()
    batch["mask_pixels"] = batch["mask_pixels"].double()
    # Losses on pixels are computed in float32.
    assert_same(model, batch, (1, 2 * batch["labels"].shape[1]), 1e-5)


def test_grouped_queries_and_hidden_states(make_model, batch) -> None:
    model = make_model(overrides={"num_key_value_heads": 1}).double().eval()
    packed = PackedRows.plan(lengths_of(batch), 64, batch["labels"].shape[1])
    for attention in ("sdpa", "causal_blocks"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            one, two = (
                model(batch["input_ids"], grid_ids=batch["grid_ids"], output_hidden_states=True, packing=p)
                for p in (None, packed.tensors())
            )
        for row, length in enumerate(lengths_of(batch)):
            for a, b in zip(one.hidden_states, two.hidden_states, strict=True):
                torch.testing.assert_close(b[row, :length], a[row, :length], rtol=1e-10, atol=1e-10)


def test_wrong_arguments_are_named(make_model, batch) -> None:
    model = make_model()
    tensors = PackedRows.plan(lengths_of(batch), 64, batch["labels"].shape[1]).tensors()
    with pytest.raises(ValueError, match="must be left out with packing"):
        model(**batch, packing=tensors, use_cache=True)
    with pytest.raises(ValueError, match="must be left out with packing"):
        model(**batch, packing=tensors, attention_mask=torch.ones_like(batch["labels"]))
    with pytest.raises(ValueError, match=r"packing must be of a batch \[2, \d+\], got one of \[3, \d+\]"):
        model(batch["input_ids"][:2], grid_ids=batch["grid_ids"][:2], packing=tensors)
    with pytest.raises(ValueError, match="packing must have source, position, place, bounds, got none of 'place'"):
        model(**batch, packing={k: v for k, v in tensors.items() if k != "place"})


@pytest.mark.parametrize("prefix", [False, True])
def test_flex_attention(make_model, batch, monkeypatch, prefix) -> None:
    """Forward, which is what it has on a CPU, and by its definition: compiling takes a minute."""
    from torch.nn.attention import flex_attention as flex
    from transformers import masking_utils
    from transformers.integrations import flex_attention as integration

    plain_mask = flex.create_block_mask
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda **k: plain_mask(**{**k, "_compile": False}))
    monkeypatch.setattr(integration, "compile_friendly_flex_attention", uncompiled(flex.flex_attention))
    model = make_model(prefix_lm=prefix).eval()
    packing = PackedRows.plan(lengths_of(batch), 70, batch["labels"].shape[1]).tensors()
    states = []
    for attention in ("sdpa", "flex_attention"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            states.append(model(batch["input_ids"], grid_ids=batch["grid_ids"], packing=packing).last_hidden_state)
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-5)


def uncompiled(function: Any) -> Any:
    return lambda query, key, value, training=False, **kwargs: function(query, key, value, **kwargs)
