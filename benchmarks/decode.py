"""Decoding masks: our native path, our path through Hugging Face's forward, and transformers' own ``generate``.

The reference is the products alone: every linear layer over the prompts, then once per mask token, and the mask codes'
logits. No attention, no norms, no cache. Weights are random, so how many drafts the
speculative method keeps says nothing about a trained model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, Contest, Contestant, Settings, Wrong
from benchmarks.models import Size, hugging_face, matrices
from ntpseg.generation import DecodingOptions, MaskGenerator

# How far below its row's greatest logit a chosen code may lie, over the greatest |logit|, in a plain float32 forward.
LIMITS = {"float32": 1e-4, "bfloat16": 5e-2}


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Models, grids and batch sizes."""
    if device.type != "cuda":
        if quick:
            sizes = [Size("smallest", 4, 24, 64, batch=2, heads=2, dtype="float32")]
        else:
            sizes = [Size("tiny", 14, 256, batch=b, heads=2, dtype=d) for b in (1, 16) for d in ("float32", "bfloat16")]
    elif quick:
        sizes = [Size("small", 8, 1024, batch=16, heads=2)]
    else:
        sizes = [Size(p, 28, 4096, batch=b, heads=2) for p in ("small", "base") for b in (1, 16, 64)]
    for size in sizes:
        yield Case("decode", size.parameters(), lambda settings, s=size: contest(s, settings))


def contest(size: Size, settings: Settings) -> Contest:
    """All contestants on one size."""
    device, dtype = settings.device, getattr(torch, size.dtype)
    model, sequence = size.model(device).eval(), size.sequence()
    ids, _ = size.batch_of(device)
    start, cells = ids.shape[1] - sequence.num_target, sequence.mask_cells
    prompts = list(ids[:, :start].cpu().numpy())
    low, high = sequence.vocabulary.mask_range

    def ours(**options: Any) -> Callable[[], Tensor]:
        generator = MaskGenerator(model, sequence, DecodingOptions(dtype=size.dtype, batch_size=size.batch, **options))
        return lambda: torch.as_tensor(generator(prompts).codes).flatten(1)

    def generate() -> Callable[[], Tensor]:
        peer = hugging_face(model).to(dtype).eval()
        peer.generation_config.eos_token_id = None
        only = _OnlyCodes(low, high)
        fixed = {"max_new_tokens": cells, "min_new_tokens": cells, "do_sample": False, "use_cache": True}

        def step() -> Tensor:
            found = peer.generate(
                ids[:, :start], logits_processor=[only], pad_token_id=sequence.vocabulary.pad, **fixed
            )
            return found[:, start:].cpu() - low

        return step

    def check(step: Callable[[], Tensor]) -> dict[str, float]:
        with torch.no_grad():
            codes = step().to(device)
            given = torch.cat([ids[:, :start], codes + low], 1)
            hidden = model(given).last_hidden_state[:, start - 1 : -1]
            logits = model.next_token_logits(hidden, (low, high))
        short = logits.amax(-1) - logits.gather(-1, codes.unsqueeze(-1)).squeeze(-1)
        errors = {"choice": float((short / logits.abs().amax(-1)).max())}
        if not errors["choice"] <= LIMITS[size.dtype]:
            raise Wrong(
                errors, f"a chosen code is {errors['choice']:.2g} below the best, limit {LIMITS[size.dtype]:.2g}"
            )
        return errors

    found = {
        "products": Contestant(
            lambda: products(model, size, start, cells, (low, high), dtype), does="linear layers only"
        ),
        "ntpseg native": Contestant(lambda: ours(decoder="native"), check, None, "greedy"),
        "ntpseg speculative": Contestant(
            lambda: ours(decoder="native", method="speculative"), check, None, "greedy, untrained drafts"
        ),
        "ntpseg huggingface": Contestant(lambda: ours(decoder="huggingface"), check, None, "greedy"),
        "transformers generate": Contestant(generate, check, None, "greedy"),
    }
    parameters = sum(weight.numel() for weight in matrices(model))
    codes = (high - low) * model.config.hidden_size
    return Contest(
        found,
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
    rooms = {}
    for rows in (size.batch * prompt, size.batch):
        inputs = {w.shape[0]: torch.randn(rows, w.shape[0], device=device).to(dtype) for w in (*weights, head)}
        outputs = {w.shape[1]: torch.empty(rows, w.shape[1], device=device, dtype=dtype) for w in (*weights, head)}
        rooms[rows] = inputs, outputs

    def through(rows: int, some: list[Tensor]) -> None:
        inputs, outputs = rooms[rows]
        for weight in some:
            torch.mm(inputs[weight.shape[0]], weight, out=outputs[weight.shape[1]])

    def step() -> None:
        through(size.batch * prompt, weights)
        for _ in range(cells - 1):
            through(size.batch, [head, *weights])
        through(size.batch, [head])

    return step


class _OnlyCodes:
    """A logits processor that leaves the mask codes alone."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, : self.low] = -torch.inf
        scores[:, self.high :] = -torch.inf
        return scores
