"""Norms and rotary tables under autocast against the Hugging Face modules that they replace."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel

from ntpseg.models.rms_norm import AutocastRMSNorm, replace_norms

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "use_cache": False,
}


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def pair(request):
    theirs = AutoModel.from_config(AutoConfig.for_model(request.param, **SIZES))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
    ours = copy.deepcopy(theirs)
    replace_norms(ours)
    return theirs, ours


def gradients(model, autocast: bool) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = model(input_ids=ids).last_hidden_state
    generator = torch.Generator().manual_seed(0)
    (hidden.to(model.norm.weight.dtype) * torch.randn(hidden.shape, generator=generator)).sum().backward()
    return torch.cat([hidden.detach().flatten().float(), *(p.grad.flatten() for p in model.parameters())])


def test_replaces_every_norm_and_no_name(pair) -> None:
    theirs, ours = pair
    norms = [type(m).__name__ for m in ours.modules() if type(m).__name__.endswith("RMSNorm")]
    assert set(norms) == {"AutocastRMSNorm"} and len(norms) >= 5
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_equal_without_autocast(pair) -> None:
    theirs, ours = pair
    torch.testing.assert_close(gradients(ours, False), gradients(theirs, False), rtol=1e-4, atol=1e-4)
    theirs.double(), ours.double()
    torch.testing.assert_close(gradients(ours, False), gradients(theirs, False), rtol=1e-5, atol=1e-5)


def test_no_less_exact_under_autocast(pair) -> None:
    theirs, ours = pair
    exact = gradients(theirs, False)
    error = [(gradients(m, True) - exact).norm() / exact.norm() for m in (ours, theirs)]
    assert 0 < error[0] < 1.5 * error[1]


def test_gradcheck() -> None:
    plain = torch.nn.Module()
    plain.weight = torch.nn.Parameter(torch.randn(6, dtype=torch.float64))
    plain.variance_epsilon = 1e-3
    norm = AutocastRMSNorm(plain)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda t, w: torch.func.functional_call(norm, {"weight": w}, (t,)), (x, norm.weight)
    )


def test_dtypes() -> None:
    plain = torch.nn.Module()
    plain.weight = torch.nn.Parameter(torch.ones(8))
    plain.variance_epsilon = 1e-6
    norm = AutocastRMSNorm(plain)
    assert norm(torch.randn(3, 8)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(3, 8, requires_grad=True)
        out = norm(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad.dtype == torch.float32 and norm.weight.grad.dtype == torch.float32
