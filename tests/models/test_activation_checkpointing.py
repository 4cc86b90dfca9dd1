"""Activation checkpointing: same loss and gradient with every part of the model, and less kept for backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ntpseg.models.packing import PackedRows


def step(model: Any, batch: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Loss and gradients, and the bytes that were kept for backward, parameters left out."""
    model.zero_grad()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss
    total = sum(kept.values())
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}, total


def assert_same_with_less(model: Any, batch: dict[str, Any], share: float) -> None:
    plain, whole = step(model, batch)
    # The former name is all that earlier releases of transformers have.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    checkpointed, kept = step(model, batch)
    assert plain.keys() == checkpointed.keys() and len(plain) > 10
    torch.testing.assert_close(checkpointed, plain, rtol=1e-6, atol=1e-9)
    assert kept < share * whole


@pytest.mark.parametrize("attention", ["sdpa", "causal_blocks"])
@pytest.mark.parametrize("packed", [False, True])
def test_heads_negatives_hard_tokens_and_dropout(make_model, batch, attention, packed) -> None:
    model = make_model(overrides={"num_hidden_layers": 6, "attention_dropout": 0.2}, negatives=4).train()
    model.set_attn_implementation(attention)
    supervised = batch["labels"] != -100
    position = supervised.int().argmax(1, keepdim=True)
    label = batch["labels"].gather(1, position)
    low = int(batch["labels"][supervised].min())
    batch |= {"het_position": position, "het_token": torch.where(label == low, low + 1, low)}
    if packed:
        lengths = [int((row != -100).nonzero().max()) + 1 for row in batch["labels"]]
        batch["packing"] = PackedRows.plan(lengths, 64, batch["labels"].shape[1]).tensors()
    assert_same_with_less(model, batch, 0.6)


@pytest.mark.parametrize("front_end", ["features", "both"])
def test_front_ends_drafts_and_losses_on_pixels(make_feature_model, feature_batch, front_end) -> None:
    model, sequence = make_feature_model(
        front_end,
        prefix_lm=True,
        negatives=3,
        num_heads_k=2,
        overrides={"num_hidden_layers": 6},
        dense_loss={"dice": 0.5, "pixel": 0.5, "soft": 0.25},
        mask_inputs={"second_pass": 0.5},
    )
    assert_same_with_less(model.train(), feature_batch(sequence), 0.9)
