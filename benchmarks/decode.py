"""Decoding masks: our native path, our path through Hugging Face's forward, and transformers' own ``generate``.

The reference is the products alone: every linear layer over the prompts, then once per mask token, and the mask codes'
logits. No attention, no norms, no cache. Weights are random, so how many drafts the speculative and the Jacobi method
keep says nothing about a trained model: `python -m benchmarks.jacobi RUN DATA` measures one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, Comparison, Grid, Provider, Settings, check_errors
from benchmarks.models import Size, hugging_face, matrices
from ntpseg.generation import DecodingOptions, MaskGenerator

# How far below its row's greatest logit a chosen code may lie, over the greatest |logit|, in a plain float32 forward.
LIMITS = {"float32": 1e-4, "bfloat16": 5e-2}


GRIDS = {
    ("cpu", "quick"): [Size("smallest", 4, 24, 64, batch=2, heads=2, dtype="float32")],
    ("cpu", "full"): [
        Size("tiny", 14, 256, batch=b, heads=2, dtype=d) for b in (1, 16) for d in ("float32", "bfloat16")
    ],
    ("cuda", "quick"): [Size("small", 8, 1024, batch=16, heads=2)],
    ("cuda", "full"): [Size(p, 28, 4096, batch=b, heads=2) for p in ("small", "base") for b in (1, 16, 64)],
}


def cases(device: torch.device, grid: Grid) -> Iterator[Case]:
    """Models, token grids and batch sizes."""
    for size in GRIDS[device.type, grid]:
        yield Case("decode", size.parameters(), partial(_comparison, size))


def _comparison(size: Size, settings: Settings) -> Comparison:
    device, dtype = settings.device, getattr(torch, size.dtype)
    model, sequence = size.model(device).eval(), size.sequence()
    ids, _ = size.batch_of(device)
    start, cells = ids.shape[1] - sequence.num_target, sequence.mask_cells
    prompts = list(ids[:, :start].cpu().numpy())
    low, high = sequence.vocabulary.mask_range

    def ours(**options: Any) -> Callable[[], Tensor]:
        options |= {"dtype": size.dtype, "batch_size": size.batch}
        generator = MaskGenerator(model, sequence, DecodingOptions(**options))
        return lambda: torch.as_tensor(generator(prompts).codes).flatten(1)

    def generate() -> Callable[[], Tensor]:
        peer = hugging_face(model).to(dtype).eval()
        peer.generation_config.eos_token_id = None
        options: dict[str, Any] = {"max_new_tokens": cells, "min_new_tokens": cells, "do_sample": False}
        options |= {"logits_processor": [mask_codes_only], "pad_token_id": sequence.vocabulary.pad, "use_cache": True}
        return lambda: peer.generate(ids[:, :start], **options)[:, start:].cpu() - low

    def mask_codes_only(input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, :low] = scores[:, high:] = -torch.inf
        return scores

    def check(step: Callable[[], Tensor]) -> dict[str, float]:
        with torch.no_grad():
            codes = step().to(device)
            sequences = torch.cat([ids[:, :start], codes + low], 1)
            hidden = model(sequences).last_hidden_state[:, start - 1 : -1]
            logits = model.next_token_logits(hidden, (low, high))
        below = logits.amax(-1) - logits.gather(-1, codes.unsqueeze(-1)).squeeze(-1)
        return check_errors({"choice": float((below / logits.abs().amax(-1)).max())}, {"choice": LIMITS[size.dtype]})

    plain = partial(products, model, size, start, cells, (low, high), dtype)
    speculative = partial(ours, decoder="native", method="speculative")
    jacobi = partial(ours, decoder="native", method="jacobi")
    providers = {
        "products": Provider(plain, computes="linear layers only"),
        "ntpseg native": Provider(partial(ours, decoder="native"), check, computes="greedy"),
        "ntpseg speculative": Provider(speculative, check, computes="greedy, untrained drafts"),
        "ntpseg jacobi": Provider(jacobi, check, computes="greedy, untrained drafts"),
        "ntpseg huggingface": Provider(partial(ours, decoder="huggingface"), check, computes="greedy"),
        "transformers generate": Provider(generate, check, computes="greedy"),
    }
    parameters = sum(weight.numel() for weight in matrices(model))
    codes = (high - low) * model.config.hidden_size
    return Comparison(
        providers,
        "products",
        flops=2.0 * size.batch * (parameters * (start + cells - 1) + codes * cells),
        bytes=float(dtype.itemsize * (parameters + codes) * cells),
        tokens=size.batch * cells,
        graphs=False,
        dtype=dtype,
    )


def products(
    model: Any, size: Size, prompt: int, cells: int, span: tuple[int, int], dtype: torch.dtype
) -> Callable[[], None]:
    """Every linear layer on prompts and then token by token, inputs and outputs allocated beforehand."""
    device = model.heads.weight.device
    weights = [weight.to(dtype).t() for weight in matrices(model)]
    head = model.heads.weight.detach()[slice(*span)].to(dtype).t()
    buffers = {}
    for rows in (size.batch * prompt, size.batch):
        inputs = {w.shape[0]: torch.randn(rows, w.shape[0], device=device).to(dtype) for w in (*weights, head)}
        outputs = {w.shape[1]: torch.empty(rows, w.shape[1], device=device, dtype=dtype) for w in (*weights, head)}
        buffers[rows] = inputs, outputs

    def multiply(rows: int, matmuls: list[Tensor]) -> None:
        inputs, outputs = buffers[rows]
        for weight in matmuls:
            torch.mm(inputs[weight.shape[0]], weight, out=outputs[weight.shape[1]])

    def step() -> None:
        multiply(size.batch * prompt, weights)
        for _ in range(cells - 1):
            multiply(size.batch, [head, *weights])
        multiply(size.batch, [head])

    return step
