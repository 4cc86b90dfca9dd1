"""One small Llama and one batch, for what does not depend on the family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(model: type[LlamaForCausalLM] = LlamaForCausalLM, **more: Any) -> Any:
    """The model, the same at every call, its logits spread over some nats."""
    torch.manual_seed(0)
    made = model(LlamaConfig(**(SIZES | more)))
    with torch.no_grad():
        made.lm_head.weight.normal_(0, 0.5)
    return made


def batch(rows: int = 2, tokens: int = 11) -> dict[str, Tensor]:
    """Ids and labels ``[rows, tokens]`` with a prompt that is not supervised."""
    ids = torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The loss under "loss" and the gradients of all parameters of one call."""
    model.zero_grad()
    out = model(**inputs)
    loss = out["loss"] if isinstance(out, dict) else out[0]
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().clone()} | found


def assert_same(found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """That losses and gradients agree to the precision of float32."""
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), name
