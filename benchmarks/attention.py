"""Causal attention, forward and backward: what the backbone can be configured with, against its plain products.

The reference is the products alone, batched: ``Q K^T`` and ``P V`` forward, four more backward, without the causal half
left out; fused causal kernels therefore can be below 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks import packed_attention
from benchmarks.attention_steps import LIMITS, PARTS, products, truth_of
from benchmarks.harness import Case, Comparison, Grid, Provider, Settings, check_errors, relative_error
from benchmarks.peers import attention as peers
from benchmarks.peers import import_error
from ntpseg.models.causal_blocks import MAX_TOKENS, causal_blocks

SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}

# B, H, T, D and dtype. A prompt, 784 image and 784 mask tokens make T = 1,664; Emu3's at 512 x 512 pixels 8,320.
GRIDS = {
    ("cpu", "quick"): [(1, 2, 48, 16, "float32")],
    ("cpu", "full"): [(4, 4, t, 64, dtype) for t in (192, 512) for dtype in ("float32", "bfloat16")],
    ("cuda", "quick"): [(8, 16, 1664, 64, "bfloat16"), (2, 32, 4096, 128, "bfloat16")],
    ("cuda", "full"): [
        *((b, 16, t, 64, "bfloat16") for b, t in ((64, 192), (16, 1024), (8, 1664), (2, 8320))),
        *((b, 32, t, 128, "bfloat16") for b, t in ((8, 1664), (2, 4096), (1, 8320))),
    ],
}


def cases(device: torch.device, grid: Grid) -> Iterator[Case]:
    """Batches of sequences, on a CPU also packed into rows."""
    for *shape, dtype in GRIDS[device.type, grid]:
        parameters = dict(zip(("B", "H", "T", "D"), shape, strict=True)) | {"dtype": dtype}
        yield Case("attention", parameters, partial(_comparison, tuple(shape), dtype, grid == "quick"))
    for packed in packed_attention.GRIDS.get(grid, []) if device.type == "cpu" else []:
        lengths = f"packed {packed.low} to {packed.high}"
        parameters = {"B": packed.sequences, "H": packed.heads, "T": lengths, "D": packed.width, "dtype": "float32"}
        yield Case("attention", parameters, partial(packed_attention.comparison, packed, "float32"))


def _comparison(shape: tuple[int, ...], name: str, quick: bool, settings: Settings) -> Comparison:
    device, dtype = settings.device, getattr(torch, name)
    batch, heads, length, width = shape
    generator = torch.Generator(device).manual_seed(0)
    query, key, value, upstream = (torch.randn(shape, device=device, generator=generator).to(dtype) for _ in range(4))
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
            truth.append(truth_of(query, key, value, upstream))
        errors = {part: relative_error(*pair) for part, *pair in zip(PARTS, step(), truth[0], strict=True)}
        return check_errors(errors, dict.fromkeys(PARTS, LIMITS[name]))

    def provider(load: Callable[[], peers.Attention], unavailable: str | None = None) -> Provider:
        return Provider(lambda: step_of(load()), check, unavailable, "causal attention")

    no_cuda = None if device.type == "cuda" else "needs a CUDA device"
    slow = "left out of --quick on a CPU: compiling takes longer than all the rest" if quick and no_cuda else None
    too_long = f"meant for T <= {MAX_TOKENS}" if length > MAX_TOKENS else None
    providers = {
        "products": Provider(lambda: products(query, key, value, upstream), computes="no softmax, no mask"),
        "ntpseg causal_blocks": provider(lambda: causal_blocks, too_long),
        "eager": provider(lambda: peers.eager),
        "sdpa": provider(partial(peers.sdpa, None)),
    }
    for title, backend in SDPA.items():
        cuda_only = backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)
        providers[title] = provider(partial(peers.sdpa, backend), no_cuda if cuda_only else None)
    providers["flex_attention"] = provider(partial(peers.flex, length, device), slow or no_cuda)
    for title, module in (("flash-attn 2", "flash_attn"), ("flash-attn 3", "flash_attn_interface")):
        providers[title] = provider(partial(peers.flash, module), no_cuda or import_error(module, cuda=True))
    providers["xformers"] = provider(peers.xformers, no_cuda or import_error("xformers.ops", cuda=True))
    return Comparison(
        providers,
        "products",
        flops=6.0 * batch * heads * length * length * width,  # six products, of which causality leaves one half
        # q, k, v, out, its gradient and three gradients, out read again
        bytes=9.0 * query.numel() * query.itemsize,
        tokens=batch * length,
        graphs=False,
        dtype=dtype,
    )
