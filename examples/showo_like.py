"""A Show-o-like step: masked image tokens and text in one batch and one vocabulary of 58,498.

    python examples/showo_like.py [--steps 4]

Show-o (arXiv 2408.12528) mixes text-to-image rows, whose masked image codes are predicted in place (no shift), with
language rows, which are shifted, in one forward pass, and weights their two losses. Each loss reads a range of
rows of the batch: the slices cost nothing, and the head's weight gathers the gradients of both.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from compare import compare, fit
from torch import Tensor, nn
from torch.nn import functional as F

from ntpseg import ntp_loss

VOCABULARY, TEXT = 58_498, 50_305  # 8,192 image codes and the last, the mask token
MASK_TOKEN = VOCABULARY - 1
IMAGE_WEIGHT, TEXT_WEIGHT = 1.0, 0.1


class OmniModel(nn.Module):
    """Embedding, one attention block, output head: the loss is the point here."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.block = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def states(self, ids: Tensor) -> Tensor:
        return self.block(self.embedding(ids))


def own_loss(model: OmniModel, states: Tensor, labels: Tensor, images: int) -> Tensor:
    """Show-o's forward: logits of everything, then two cross-entropies."""
    logits = model.head(states)
    image = F.cross_entropy(logits[:images].flatten(0, 1), labels[:images].flatten())
    text = F.cross_entropy(logits[images:, :-1].flatten(0, 1), labels[images:, 1:].flatten())
    return IMAGE_WEIGHT * image + TEXT_WEIGHT * text


def fused_loss(model: OmniModel, states: Tensor, labels: Tensor, images: int) -> Tensor:
    """The same without logits; only the supervised positions cost anything."""
    image = ntp_loss(states[:images], model.head.weight, labels[:images], shift=False, negatives=0)
    text = ntp_loss(states[images:], model.head.weight, labels[images:], negatives=0)
    return IMAGE_WEIGHT * image.loss + TEXT_WEIGHT * text.loss


def batch(args: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    """Input ids and labels ``[B, T]``: image rows first, each with a text prompt that is not supervised."""
    rows, length = 2 * args.images, args.tokens
    ids = torch.randint(0, TEXT, (rows, length), device=device)
    labels = ids.clone()
    codes = torch.randint(TEXT, MASK_TOKEN, (args.images, length), device=device)
    hidden = torch.rand(args.images, length, device=device) < 0.5
    hidden[:, : length // 4] = False
    ids[: args.images] = torch.where(hidden, MASK_TOKEN, codes)
    labels[: args.images] = torch.where(hidden, codes, -100)
    return ids, labels


def train(loss_function: Callable[..., Tensor], args: argparse.Namespace, device: torch.device) -> list[float]:
    torch.manual_seed(0)
    model = OmniModel(args.width).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ids, labels = batch(args, device)
    return fit(optimizer, lambda: loss_function(model, model.states(ids), labels, args.images), args.steps)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return compare(lambda: train(own_loss, args, device), lambda: train(fused_loss, args, device), device)


if __name__ == "__main__":
    main()
