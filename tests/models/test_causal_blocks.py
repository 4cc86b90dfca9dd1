"""Block attention equals PyTorch's, alone and under a Hugging Face decoder."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3Model

from ntpseg.models import causal_blocks


@pytest.mark.parametrize("length", [1, 2, 7, 64, 157, 158, 301, 421])
@pytest.mark.parametrize("layout", ["heads first", "tokens first", "features apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_sdpa_with_gradients(length: int, layout: str, dtype: torch.dtype) -> None:
    wide = [torch.randn(2, 3, length, 16, dtype=torch.float64) for _ in range(4)]
    if layout == "tokens first":
        wide = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in wide]
    elif layout == "features apart":
        wide = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in wide]
    results = []
    for kind in (torch.float64, dtype):
        q, k, v = (t.to(kind).requires_grad_() for t in wide[:3])
        if kind == torch.float64:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            out = causal_blocks.causal_blocks(q, k, v)
        results.append([out, *torch.autograd.grad(out, (q, k, v), wide[3].to(kind))])
    limit = 1e-5 if dtype == torch.float32 else 3e-2
    for true, got in zip(*results):
        assert (got.double() - true).norm() <= limit * (true.norm() + 1e-9)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_equals_the_plain_operators_in_float64(scale: float | None) -> None:
    q, k, v, g = (torch.randn(3, 2, 230, 8, dtype=torch.float64, requires_grad=i < 3) for i in range(4))
    true = causal_blocks.reference(q, k, v, scale=scale or 8**-0.5)
    got = causal_blocks.causal_blocks(q, k, v, scale=scale)
    assert torch.allclose(got, true, rtol=1e-12, atol=1e-12)
    pairs = zip(torch.autograd.grad(got, (q, k, v), g), torch.autograd.grad(true, (q, k, v), g), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-12) for a, b in pairs)
    with torch.no_grad():
        assert torch.equal(causal_blocks.causal_blocks(q, k, v, scale=scale), got)


def prefix_of(length: int, lengths: list[int | str]) -> torch.Tensor:
    step = causal_blocks.query_blocks(length)[0][1]
    places = {"block": step, "in a block": step + (length - step) // 3 + 1, "all but one": length - 1, "all": length}
    return torch.tensor([places.get(number, number) for number in lengths])


PREFIXES = [[0, 0, 0], [1, 1, 1], ["all"] * 3, ["block"] * 3, ["in a block"] * 3, [2, "in a block", "all but one"]]


@pytest.mark.parametrize("length", [3, 97, 157, 230, 301])
@pytest.mark.parametrize("lengths", PREFIXES)
def test_prefix_equals_the_definition_in_float64(length: int, lengths: list[int | str]) -> None:
    prefix = prefix_of(length, lengths).clamp_max(length)
    seen = torch.tensor(
        [[[key <= q or (q < p and key < p) for key in range(length)] for q in range(length)] for p in prefix.tolist()]
    )
    q, k, v, g = (torch.randn(3, 2, length, 8, dtype=torch.float64, requires_grad=i < 3) for i in range(4))
    scores = 0.3 * (q @ k.transpose(-1, -2))
    true = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ v
    got = causal_blocks.causal_blocks(q, k, v, scale=0.3, prefix=prefix)
    assert torch.allclose(got, true, rtol=1e-12, atol=1e-12)
    assert torch.allclose(causal_blocks.reference(q, k, v, scale=0.3, prefix=prefix), true, rtol=1e-12, atol=1e-12)
    pairs = zip(torch.autograd.grad(got, (q, k, v), g), torch.autograd.grad(true, (q, k, v), g), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-12) for a, b in pairs)
    with torch.no_grad():
        assert torch.equal(causal_blocks.causal_blocks(q, k, v, scale=0.3, prefix=prefix), got)


@pytest.mark.parametrize("prefix", [[1, 2], [1, 2, 10], [0, -1, 0]])
def test_a_wrong_prefix_is_named(prefix: list[int]) -> None:
    q = torch.randn(3, 1, 9, 4)
    with pytest.raises(ValueError, match=r"prefix must be 3 numbers from 0 to 9, got \["):
        causal_blocks.causal_blocks(q, q, q, prefix=torch.tensor(prefix))


def test_compiled_with_a_prefix() -> None:
    q, k, v, g = (torch.randn(2, 3, 230, 8, dtype=torch.float64) for _ in range(4))

    def call(*inputs: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        return causal_blocks.causal_blocks(*inputs, prefix=prefix) * 2

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for prefix in (torch.tensor([130, 7]), torch.tensor([0, 230])):
        results = []
        for function in (call, compiled):
            inputs = [t.clone().requires_grad_() for t in (q, k, v)]
            out = function(*inputs, prefix=prefix)
            results.append([out, *torch.autograd.grad(out, inputs, g)])
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-11) for a, b in zip(*results, strict=True))
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
    inputs = [t.requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(causal_blocks._operator, (*inputs, 0.3, torch.tensor([130, 7])), test_utils=kinds)


@pytest.mark.parametrize("tokens_first", [False, True])
def test_compiled_without_a_graph_break(tokens_first: bool) -> None:
    tensors = [torch.randn(2, 3, 230, 8, dtype=torch.float64) for _ in range(4)]
    if tokens_first:
        tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    q, k, v, g = tensors
    compiled = torch.compile(lambda *a: causal_blocks.causal_blocks(*a) * 2, fullgraph=True, backend="aot_eager")
    results = []
    for function in (lambda *a: causal_blocks.reference(*a, scale=8**-0.5) * 2, compiled):
        inputs = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        out = function(*inputs)
        results.append([out, *torch.autograd.grad(out, inputs, g)])
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-11) for a, b in zip(*results, strict=True))
    # One program serves other lengths.
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(causal_blocks.causal_blocks, fullgraph=True, backend=counter)
    for length in (230, 229, 120, 301, 97):
        inputs = [torch.randn(2, 3, length, 8) for _ in range(3)]
        assert torch.equal(compiled(*inputs), causal_blocks.causal_blocks(*inputs))
    assert counter.frame_count <= 2
    # Not the comparison of outputs: the end of the probabilities' storage is never written.
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        causal_blocks._operator, (*(t.requires_grad_() for t in (q, k, v)), 0.3, None), test_utils=kinds
    )


def test_gradients_of_some_inputs_alone() -> None:
    q, k, v = (torch.randn(2, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    v.requires_grad_()
    causal_blocks.causal_blocks(q, k, v).sum().backward()
    expected = torch.autograd.grad(causal_blocks.reference(q, k, v, scale=0.5).sum(), v)[0]
    assert v.grad is not None and torch.allclose(v.grad, expected)


def decoders() -> list[Qwen3Model]:
    models = []
    for name in ("sdpa", causal_blocks.NAME):
        causal_blocks.register()
        config = Qwen3Config(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            attn_implementation=name,
        )
        torch.manual_seed(0)
        models.append(Qwen3Model(config).eval())
    return models


def test_decoder_agrees_plain_padded_and_cached() -> None:
    plain, blocks = decoders()
    ids = torch.randint(50, (3, 21))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    for kwargs in ({}, {"attention_mask": mask}):
        a, b = (m(ids, use_cache=False, **kwargs).last_hidden_state for m in (plain, blocks))
        keep = mask.bool() if kwargs else torch.ones_like(ids).bool()
        assert torch.allclose(a[keep], b[keep], atol=1e-5)
    first = blocks(ids[:, :15], use_cache=True)
    rest = blocks(ids[:, 15:], past_key_values=first.past_key_values, use_cache=True).last_hidden_state
    assert torch.allclose(rest, plain(ids, use_cache=False).last_hidden_state[:, 15:], atol=1e-5)
