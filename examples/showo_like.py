"""A Show-o-like step, its loss untouched: masked image codes and text in one batch and one vocabulary of 58,498.

    python examples/showo_like.py [--steps 4]

Show-o (arXiv 2408.12528, github.com/showlab/Show-o) takes the logits of one forward pass apart by rows: text-to-image
rows, whose masked image codes are predicted in place (no shift) behind a prompt of fixed length; language rows and
rows of questions about images, which are shifted; and adds three weighted cross-entropies. Each is a fused loss here,
and the head's weight gathers the gradients of all. Prompts are dropped with probability 0.1 for classifier-free
guidance.
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

from ntpseg.losses.fused_cross_entropy import fused_cross_entropy

VOCABULARY, TEXT = 58_498, 50_305  # 8,192 image codes and the last, the mask token
MASK_TOKEN, NO_TEXT = VOCABULARY - 1, 0
IMAGE_WEIGHT, TEXT_WEIGHT, ANSWER_WEIGHT = 1.0, 0.1, 0.1
DROP = 0.1


class OmniModel(nn.Module):
    """Embedding, one attention block, output head with a bias, as Phi has: the loss is the point here."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.block = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.lm_head = nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.block(self.embedding(ids))).float()


def step_loss(model: OmniModel, ids: Tensor, labels: Tensor, images: int, texts: int, prompt: int) -> Tensor:
    """Show-o's: the first rows are images, then text, then answers."""
    logits = model(ids)

    def cross_entropy(rows: slice, inputs: slice, targets: slice) -> Tensor:
        part = logits[rows, inputs].contiguous().view(-1, VOCABULARY)
        return F.cross_entropy(part, labels[rows, targets].contiguous().view(-1), ignore_index=-100)

    before, after = slice(None, -1), slice(1, None)
    image = cross_entropy(slice(images), slice(prompt, None), slice(prompt, None))
    text = cross_entropy(slice(images, images + texts), before, after)
    answer = cross_entropy(slice(images + texts, None), before, after)
    return IMAGE_WEIGHT * image + TEXT_WEIGHT * text + ANSWER_WEIGHT * answer


def batch(args: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Input ids and labels ``[B, T]`` and the length of the images' prompts."""
    rows, length = 3 * args.images, args.tokens
    prompt = length // 4
    ids = torch.randint(1, TEXT, (rows, length), device=device)
    labels = ids.clone()
    labels[2 * args.images :, : length // 2] = -100  # the question
    codes = torch.randint(TEXT, MASK_TOKEN, (args.images, length), device=device)
    hidden = torch.rand(args.images, length, device=device) < 0.5
    image_ids = torch.where(hidden, MASK_TOKEN, codes)
    dropped = torch.rand(args.images, 1, device=device) < DROP
    image_ids[:, :prompt] = torch.where(dropped, NO_TEXT, ids[: args.images, :prompt])
    ids[: args.images] = image_ids
    labels[: args.images] = torch.where(hidden, codes, -100)
    return ids, labels, prompt


def train(around: Callable[[nn.Module], Any], args: argparse.Namespace, device: torch.device) -> list[float]:
    """The losses of a short training; `around` gives the context in which the loss is computed."""
    torch.manual_seed(0)
    model = OmniModel(args.width).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ids, labels, prompt = batch(args, device)

    def loss() -> Tensor:
        with around(model.lm_head):
            return step_loss(model, ids, labels, args.images, args.images, prompt)

    return fit(optimizer, loss, args.steps)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return compare(
        lambda: train(lambda head: contextlib.nullcontext(), args, device),
        lambda: train(lambda head: fused_cross_entropy(head, negatives=0), args, device),
        device,
    )


if __name__ == "__main__":
    main()
