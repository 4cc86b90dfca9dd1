"""A LlamaGen-like loop: class-conditional image tokens, a vocabulary that is the codebook alone, weights per token.

    python examples/llamagen_like.py [--steps 12]

LlamaGen (arXiv 2406.06525) feeds ``[class, code_1 .. code_{n-1}]`` and compares position i with code_i, so there is no
shift, and masks its loss with a weight per token (``valid``): ``(loss * valid).sum() / valid.sum()``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from compare import compare, fit
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel

from ntpseg import ntp_loss


class ImageGenerator(nn.Module):
    """Class embedding, code embedding, Llama decoder, output head over the codebook."""

    def __init__(self, codes: int, classes: int, width: int, tokens: int) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=codes,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokens,
        )
        self.decoder = LlamaModel(config)
        self.classes = nn.Embedding(classes, width)
        self.head = nn.Linear(width, codes, bias=False)

    def states(self, label: Tensor, codes: Tensor) -> Tensor:
        """Hidden states ``[B, n, D]``; position i has seen the class and the codes before i."""
        inputs = torch.cat([self.classes(label).unsqueeze(1), self.decoder.embed_tokens(codes[:, :-1])], 1)
        return self.decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state


def own_loss(model: ImageGenerator, states: Tensor, codes: Tensor, valid: Tensor) -> Tensor:
    """What LlamaGen computes."""
    loss = F.cross_entropy(model.head(states).flatten(0, 1), codes.flatten(), reduction="none")
    return (loss * valid.flatten()).sum() / valid.sum()


def fused_loss(model: ImageGenerator, states: Tensor, codes: Tensor, valid: Tensor) -> Tensor:
    """The same without logits; leave out ``negatives=0`` for TCL on top."""
    return ntp_loss(states, model.head.weight, codes, shift=False, token_weights=valid, negatives=0).loss


def train(loss_function: Callable[..., Tensor], args: argparse.Namespace, device: torch.device) -> list[float]:
    torch.manual_seed(0)
    model = ImageGenerator(args.codes, 4, args.width, args.tokens).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pictures = torch.randint(0, args.codes, (4, args.tokens), device=device)

    def loss() -> Tensor:
        label = torch.randint(0, 4, (args.batch,), device=device)
        valid = (torch.rand(args.batch, args.tokens, device=device) > 0.2).float()
        return loss_function(model, model.states(label, pictures[label]), pictures[label], valid)

    return fit(optimizer, loss, args.steps)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codes", type=int, default=16384)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return compare(lambda: train(own_loss, args, device), lambda: train(fused_loss, args, device), device)


if __name__ == "__main__":
    main()
