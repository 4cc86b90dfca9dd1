"""A LlamaGen-like loop, its forward and its loss untouched: image codes after a class or a caption.

    python examples/llamagen_like.py [--condition class|caption] [--steps 12]

LlamaGen (arXiv 2406.06525, github.com/FoundationVision/LlamaGen) feeds the condition's tokens and ``code_1 ..
code_{n-1}``, compares the positions from the condition's last one on with ``code_1 .. code_n``, so there is no shift,
and computes the loss inside of its forward. The vocabulary is the codebook, 16,384. With probability 0.1 the
condition is dropped for classifier-free guidance. Rows of the caption model carry a flag ``valid`` that weighs their
loss, which therefore is one number per token first: there the fused loss is computed once more in the backward pass,
and has no TCL.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

import torch
from compare import compare, fit
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel

from ntpseg.losses.fused_cross_entropy import fused_cross_entropy

CLASSES, CAPTION_WIDTH, CAPTION_TOKENS = 10, 48, 5
DROP = 0.1


class ImageGenerator(nn.Module):
    """Condition, code embedding, Llama decoder, output head over the codebook."""

    def __init__(self, condition: str, codes: int, width: int, tokens: int) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=codes,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokens + CAPTION_TOKENS,
        )
        self.decoder = LlamaModel(config)
        self.by_class = condition == "class"
        self.condition_tokens = 1 if self.by_class else CAPTION_TOKENS
        self.classes = nn.Embedding(CLASSES + 1, width)  # the last: none
        self.caption = nn.Linear(CAPTION_WIDTH, width, bias=False)
        self.no_caption = nn.Parameter(torch.randn(CAPTION_TOKENS, CAPTION_WIDTH))
        self.output = nn.Linear(width, codes, bias=False)

    def conditions(self, condition: Tensor) -> Tensor:
        """``[B, c, D]`` of classes ``[B]`` or caption features ``[B, c, E]``, some of them dropped in training."""
        dropped = torch.rand(len(condition), device=condition.device) < (DROP if self.training else 0.0)
        if self.by_class:
            return self.classes(torch.where(dropped, CLASSES, condition)).unsqueeze(1)
        return self.caption(torch.where(dropped[:, None, None], self.no_caption, condition))

    def forward(self, idx: Tensor, condition: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
        """The loss; ``idx`` are the codes but for the last, ``targets`` all of them, ``valid`` ``[B]`` weights."""
        inputs = torch.cat([self.conditions(condition), self.decoder.embed_tokens(idx)], 1)
        logits = self.output(self.decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state).float()
        logits = logits[:, self.condition_tokens - 1 :].contiguous()
        if valid is None:
            return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
        each = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), reduction="none")
        weight = valid[:, None].expand_as(targets).reshape(-1)
        return (each * weight).sum() / weight.sum().clamp_min(1)


def train(around: Callable[[nn.Module], Any], args: argparse.Namespace, device: torch.device) -> list[float]:
    """The losses of a short training; `around` gives the context in which the model is called."""
    torch.manual_seed(0)
    model = ImageGenerator(args.condition, args.codes, args.width, args.tokens).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pictures = torch.randint(0, args.codes, (4, args.tokens), device=device)
    captions = torch.randn(4, CAPTION_TOKENS, CAPTION_WIDTH, device=device)

    def loss() -> Tensor:
        label = torch.randint(0, 4, (args.batch,), device=device)
        codes, valid = pictures[label], None
        condition = label if model.by_class else captions[label]
        if not model.by_class:
            valid = (torch.rand(args.batch, device=device) > 0.2).float()
        with around(model.output):
            return model(codes[:, :-1], condition, codes, valid)

    return fit(optimizer, loss, args.steps)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--condition", choices=("class", "caption"), default="class")
    parser.add_argument("--codes", type=int, default=16384)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return compare(
        lambda: train(lambda head: contextlib.nullcontext(), args, device),
        lambda: train(lambda head: fused_cross_entropy(head, negatives=0), args, device),
        device,
    )


if __name__ == "__main__":
    main()
