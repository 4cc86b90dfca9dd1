"""The self-check finds what the structure lets through, at the right time, and leaves no trace."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from tiny_llama import assert_same, batch, build, gradients
from torch import nn

from ntpseg import ntp_loss
from ntpseg.losses import lm_head
from ntpseg.losses.huggingface import fuse_causal_lm, is_fused


class Counter(nn.Module):
    """A norm that counts its calls in a buffer and draws random numbers from all three generators."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.drop = nn.Dropout(0.5)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        noise = torch.rand(()) + random.random() + float(np.random.rand())
        return self.drop(hidden) + 0 * noise


def test_leaves_no_trace() -> None:
    model = build(attention_dropout=0.3)
    model.model.norm = Counter()
    model.train()
    model.model.layers[0].eval()
    model.model.layers[1].mlp.requires_grad_(False)
    model(**batch())["loss"].backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    calls: list[str] = []
    handles = [
        model.model.layers[0].register_forward_hook(lambda *_: calls.append("forward")),
        model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append("pre")),
        model.model.layers[1].register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    model.model.norm.calls.zero_()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    modes = {name: module.training for name, module in model.named_modules()}
    expected = random.random(), float(np.random.rand()), float(torch.rand(()))
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    with torch.no_grad():
        fuse_causal_lm(model, negatives=0)
        assert not torch.is_grad_enabled()
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == expected
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert float(model.model.norm.calls) == 0
    assert calls == []
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters() if p.grad is not None)
    assert not any(p.requires_grad for p in model.model.layers[1].mlp.parameters())
    model(**batch())["loss"].backward()
    assert sorted(calls) == ["backward", "forward", "pre"]
    for handle in handles:
        handle.remove()
    calls.clear()
    model(**batch())
    assert calls == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss": 1.01}, r"got a loss of .* where its own is .* LlamaForCausalLM .* Likely cause"),
        ({"hidden": 1.1}, "gradients of the head's hidden states that differ"),
        ({"weight": 1.1}, "gradients of the head's weight that differ"),
    ],
    ids=str,
)
def test_finds_a_wrong_loss_and_wrong_gradients(wrong: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused loss itself is falsified: no structure of the model shows that."""

    def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor + (x * (1 - factor)).detach()

    def falsified(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, **keywords: Any) -> Any:
        out = ntp_loss(
            scaled(hidden, wrong.get("hidden", 1.0)), scaled(weight, wrong.get("weight", 1.0)), labels, **keywords
        )
        object.__setattr__(out, "loss", out.loss * wrong.get("loss", 1.0))
        return out

    monkeypatch.setattr(lm_head, "ntp_loss", falsified)
    model = build()
    with pytest.raises(ValueError, match=message):
        fuse_causal_lm(model)
    assert not is_fused(model)
    fuse_causal_lm(model, check=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_passes_in_every_dtype(dtype: torch.dtype) -> None:
    model = build().to(dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # logits of tens of nats, as a trained model has on random tokens
    fuse_causal_lm(model)


def test_passes_under_inference_mode_and_autocast() -> None:
    model = build()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        fuse_causal_lm(model)
    assert is_fused(model)


def test_waits_for_weights_that_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = build()
    fuse_causal_lm(model, negatives=0)
    assert model.ntp_fusion.check_pending
    model.to_empty(device="cpu")
    plain = build()
    model.load_state_dict(plain.state_dict())
    model.model.rotary_emb.inv_freq = plain.model.rotary_emb.inv_freq
    assert_same(gradients(model, batch()), gradients(plain, batch()))
    assert not model.ntp_fusion.check_pending

    with torch.device("meta"):
        model = build()
    fuse_causal_lm(model, negatives=0).to_empty(device="cpu")
    model.load_state_dict(plain.state_dict())
    model.model.rotary_emb.inv_freq = plain.model.rotary_emb.inv_freq
    monkeypatch.setattr(lm_head, "ntp_loss", lambda h, *args, **keywords: ntp_loss(1.1 * h, *args, **keywords))
    with pytest.raises(ValueError, match="the fused loss must be the model's own"):
        model(**batch())
    with pytest.raises(ValueError, match="the fused loss must be the model's own"):
        model(**batch())
