"""Causal attention, forward and backward: what the backbone can be configured with, against its plain products.

The reference is the products alone, batched: ``Q K^T`` and ``P V`` forward, four more backward, without the causal half
left out; fused causal kernels therefore can be below 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks.harness import Case, Contest, Contestant, Settings, Wrong
from benchmarks.peers import attention as peers
from ntpseg.models.causal_blocks import MAX_TOKENS, causal_blocks

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Sequences of a prompt, 784 image and 784 mask tokens make T = 1,664; 8,320 are Emu3's at 512 x 512 pixels."""
    if device.type != "cuda":
        grid = [(1, 2, 48, 16, "float32")] if quick else [(4, 4, t, 64, d) for t in (192, 512) for d in _dtypes()]
    elif quick:
        grid = [(8, 16, 1664, 64, "bfloat16"), (2, 32, 4096, 128, "bfloat16")]
    else:
        grid = [(b, 16, t, 64, "bfloat16") for b, t in ((64, 192), (16, 1024), (8, 1664), (2, 8320))]
        grid += [(b, 32, t, 128, "bfloat16") for b, t in ((8, 1664), (2, 4096), (1, 8320))]
    for batch, heads, length, width, dtype in grid:
        parameters = {"B": batch, "H": heads, "T": length, "D": width, "dtype": dtype}
        shape = (batch, heads, length, width)
        yield Case("attention", parameters, lambda settings, s=shape, d=dtype: contest(s, d, settings, quick))


def _dtypes() -> tuple[str, str]:
    return "float32", "bfloat16"


def contest(shape: tuple[int, int, int, int], name: str, settings: Settings, quick: bool) -> Contest:
    """All contestants on one shape."""
    device, dtype = settings.device, getattr(torch, name)
    batch, heads, length, width = shape
    draw = torch.Generator(device).manual_seed(0)
    query, key, value, upstream = (torch.randn(shape, device=device, generator=draw).to(dtype) for _ in range(4))
    for tensor in (query, key, value):
        tensor.requires_grad_()

    def step_of(call: peers.Attention) -> Callable[[], tuple[Tensor, ...]]:
        def step() -> tuple[Tensor, ...]:
            out = call(query, key, value)
            return (out.detach(), *torch.autograd.grad(out, (query, key, value), upstream))

        return step

    truth: list[tuple[Tensor, ...]] = []

    def check(step: Callable[[], tuple[Tensor, ...]]) -> dict[str, float]:
        if not truth:
            truth.append(_truth(query, key, value, upstream))
        errors = {
            part: float(torch.linalg.vector_norm(found.double() - right) / torch.linalg.vector_norm(right))
            for part, found, right in zip(("out", "d_query", "d_key", "d_value"), step(), truth[0], strict=True)
        }
        if not max(errors.values()) <= LIMITS[dtype]:
            raise Wrong(errors, f"an error is above {LIMITS[dtype]:.2g}")
        return errors

    def contestant(make: Callable[[], peers.Attention], reason: str | None = None) -> Contestant:
        return Contestant(lambda: step_of(make()), check, reason, "causal attention")

    cuda = None if device.type == "cuda" else "needs a CUDA device"
    slow = "left out of --quick on a CPU: compiling takes longer than all the rest" if quick and cuda else None
    long = f"meant for T <= {MAX_TOKENS}" if length > MAX_TOKENS else None
    found = {
        "products": Contestant(lambda: products(query, key, value, upstream), does="no softmax, no mask"),
        "ntpseg causal_blocks": contestant(lambda: causal_blocks, long),
        "eager": contestant(lambda: peers.eager),
        "sdpa": contestant(lambda: peers.sdpa(None)),
    }
    for title, backend in SDPA.items():
        only_cuda = cuda if backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION) else None
        found[title] = contestant(lambda b=backend: peers.sdpa(b), only_cuda)
    found["flex_attention"] = contestant(lambda: peers.flex(length, device), slow or cuda)
    for title, module in (("flash-attn 2", "flash_attn"), ("flash-attn 3", "flash_attn_interface")):
        found[title] = contestant(lambda m=module: peers.flash(m), cuda or peers.installed(module))
    found["xformers"] = contestant(peers.xformers, cuda or peers.installed("xformers.ops"))
    flops = 6.0 * batch * heads * length * length * width  # six products, of which causality leaves one half
    moved = 9.0 * query.numel() * query.itemsize  # q, k, v, out, its gradient and three gradients, out read again
    tokens = batch * length
    return Contest(found, "products", flops=flops, bytes=moved, tokens=tokens, graphs=False, dtype=dtype)


def products(query: Tensor, key: Tensor, value: Tensor, upstream: Tensor) -> Callable[[], Any]:
    """The six batched products of attention, forward and backward."""
    query, key, value = (x.detach() for x in (query, key, value))
    scores = query @ key.transpose(-1, -2)
    out, change = torch.empty_like(query), torch.empty_like(scores)

    def step() -> None:
        torch.matmul(query, key.transpose(-1, -2), out=scores)
        torch.matmul(scores, value, out=out)
        torch.matmul(scores.transpose(-1, -2), upstream, out=out)
        torch.matmul(upstream, value.transpose(-1, -2), out=change)
        torch.matmul(change, key, out=out)
        torch.matmul(change.transpose(-1, -2), query, out=out)

    return step


def _truth(query: Tensor, key: Tensor, value: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    """Float64, one sample and head at a time: long sequences' scores are large."""
    parts = []
    flat = [x.detach().flatten(0, 1) for x in (query, key, value, upstream)]
    for *inputs, change in zip(*flat, strict=True):
        leaves = [x.double().requires_grad_() for x in inputs]
        out = peers.eager(*leaves)
        parts.append((out.detach(), *torch.autograd.grad(out, leaves, change.double())))
    return tuple(torch.stack(part).view(query.shape) for part in zip(*parts, strict=True))
