"""A Janus-like step: text through the language model's head, image tokens through a head of their own.

    python examples/janus_like.py [--steps 6]

Janus (arXiv 2410.13848, github.com/deepseek-ai/Janus) generates 576 image tokens of a codebook of 16,384 after a
prompt: embedded by a table of their own and an aligner, read by a Llama, predicted by a generation head (a linear
layer, GELU, and a linear layer over the codebook) from the hidden state one position before. Text keeps the Llama's
head and vocabulary of 102,400. Two heads, two vocabularies, one loss: the Llama is fused by `fuse_causal_lm`, the
generation head's last layer by `fused_cross_entropy`. Chameleon-like models with one head and a range of image ids
need no more than ``ntp_loss(..., vocab_range=...)``.
"""

from __future__ import annotations

import argparse
import contextlib

import torch
from compare import compare, fit
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from ntpseg.losses.fused_cross_entropy import fused_cross_entropy
from ntpseg.losses.huggingface import fuse_causal_lm

DROP = 0.1


class Unified(nn.Module):
    """The parts of Janus that generate: Llama, embedding and aligner of image tokens, generation head."""

    def __init__(self, vocabulary: int, codes: int, width: int) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        self.language_model = LlamaForCausalLM(config)
        self.gen_embed = nn.Embedding(codes, 8)
        self.gen_aligner = nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, width))
        self.gen_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, codes))

    def image_loss(self, prompt: Tensor, codes: Tensor) -> Tensor:
        """Cross-entropy of codes ``[B, n]`` after prompts ``[B, p]``, some of them dropped for guidance."""
        dropped = torch.rand(len(prompt), 1, device=prompt.device) < DROP
        text = self.language_model.get_input_embeddings()(torch.where(dropped, 0, prompt))
        inputs = torch.cat([text, self.gen_aligner(self.gen_embed(codes[:, :-1]))], 1)
        states = self.language_model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        logits = self.gen_head(states[:, prompt.shape[1] - 1 :])
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


def train(fused: bool, args: argparse.Namespace, device: torch.device) -> list[float]:
    """The losses of a short training on rows of both kinds."""
    torch.manual_seed(0)
    model = Unified(args.vocabulary, args.codes, args.width).to(device)
    if fused:
        fuse_causal_lm(model.language_model, negatives=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.randint(3, args.vocabulary, (args.batch, args.tokens), device=device)
    codes = torch.randint(0, args.codes, (args.batch, args.tokens), device=device)

    def loss() -> Tensor:
        head = model.gen_head[-1]
        with fused_cross_entropy(head, negatives=0) if fused else contextlib.nullcontext():
            image = model.image_loss(text[:, :8], codes)
        return image + model.language_model(input_ids=text, labels=text).loss

    return fit(optimizer, loss, args.steps)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=102_400)
    parser.add_argument("--codes", type=int, default=16_384)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return compare(lambda: train(False, args, device), lambda: train(True, args, device), device)


if __name__ == "__main__":
    main()
