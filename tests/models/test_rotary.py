"""Norm and rotary embedding in one function equal plain operators, alone and inside Hugging Face's attention layers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model

from ntpseg.models import rotary

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def tables(rows: int, length: int, width: int) -> tuple[Tensor, Tensor]:
    angle = torch.randn(rows, length, width // 2, dtype=torch.float64).repeat(1, 1, 2)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (3, 7, 2, 8), (5, 300, 3, 64), (9, 1000, 4, 16)])
@pytest.mark.parametrize("own_tables", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_equals_plain_operators_with_gradients(
    shape: tuple[int, int, int, int], own_tables: bool, normed: bool
) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(shape[-1], dtype=torch.float64, requires_grad=True) if normed else None
    cos, sin = tables(shape[0] if own_tables else 1, shape[1], shape[3])
    gradient = torch.randn(shape[0], shape[2], shape[1], shape[3], dtype=torch.float64)
    results = []
    for function in (rotary.reference, rotary.norm_rotary):
        out = function(x, weight, 1e-6, cos, sin)
        inputs = [x] if weight is None else [x, weight]
        results.append([out, *torch.autograd.grad(out, inputs, gradient)])
    for true, got in zip(*results, strict=True):
        assert torch.allclose(got, true, rtol=1e-10, atol=1e-11)
    narrow = rotary.norm_rotary(x.float(), None if weight is None else weight.float(), 1e-6, cos.float(), sin.float())
    assert (narrow.double() - results[0][0]).norm() <= 1e-6 * results[0][0].norm()


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("attention", ["sdpa", "causal_blocks", "eager"])
def test_a_decoder_gives_what_hugging_faces_own_gives(family: str, attention: str, monkeypatch: Any) -> None:
    called = []
    monkeypatch.setattr(rotary, "norm_rotary", lambda *a, plain=rotary.norm_rotary: called.append(1) or plain(*a))
    config, model = {"qwen3": (Qwen3Config, Qwen3Model), "llama": (LlamaConfig, LlamaModel)}[family]
    torch.manual_seed(0)
    theirs = model(config(**SIZES, attn_implementation=attention)).double()
    ours = copy.deepcopy(theirs)
    rotary.replace_rotary(ours)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    # Hugging Face's norms round to float32 even then.
    models = (theirs, ours)
    ids = torch.randint(50, (3, 21))
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    for extra in ({}, {"attention_mask": mask}, {"position_ids": torch.randint(40, (3, 21))}):
        outs = [m(ids, use_cache=False, **extra).last_hidden_state for m in models]
        kept = mask.bool() if "attention_mask" in extra else torch.ones_like(mask).bool()
        assert torch.allclose(outs[0][kept], outs[1][kept], atol=1e-5)
        gradients = [
            torch.autograd.grad(o[kept].square().sum(), list(m.parameters())) for o, m in zip(outs, (theirs, ours))
        ]
        assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(*gradients, strict=True))
    assert len(called) == (0 if attention == "eager" else 3 * 2 * 2)
    # With a cache, and in a copy that was pickled.
    first = ours(ids[:, :15], use_cache=True)
    rest = pickle.loads(pickle.dumps(ours))(ids[:, 15:], past_key_values=first.past_key_values, use_cache=True)
    assert torch.allclose(rest.last_hidden_state, theirs(ids, use_cache=False).last_hidden_state[:, 15:], atol=1e-5)


def test_probabilities_can_still_be_had() -> None:
    model = Qwen3Model(Qwen3Config(**SIZES, attn_implementation="eager"))
    rotary.replace_rotary(model)
    attentions = model(torch.randint(50, (2, 5)), output_attentions=True).attentions
    assert [tuple(layer.shape) for layer in attentions] == [(2, 4, 5, 5)] * 2
