"""The baselines' networks: a U-Net with or without the sentence, a U-Net with attention to its words, DynUNet.

Each takes images float32 ``[B, C, S, S]`` and what `Sentences` makes of the texts, and returns logits ``[B, 1, S, S]``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.blocks import ResidualUnit
from monai.networks.nets import DynUNet, UNet
from torch import Tensor, nn
from torch.nn import functional as F

TEXT_CHANNELS = 16
WORD_DIM = 64


def words(text: str, longest: int = 3) -> list[str]:
    """Words, and groups of up to `longest` neighbouring words."""
    tokens = re.findall(r"\w+", text.lower())
    return [" ".join(tokens[i : i + n]) for n in range(1, longest + 1) for i in range(len(tokens) - n + 1)]


class Sentences:
    """Sentences as tensors, by the words of the training split.

    Args:
        texts: of the training split.
        longest: see `words`.
    """

    def __init__(self, texts: Sequence[str], longest: int = 3) -> None:
        self.longest = longest
        self.names: dict[str, int] = {}
        for text in texts:
            for word in words(text, longest):
                self.names.setdefault(word, len(self.names))

    def __len__(self) -> int:
        return len(self.names)

    def multi_hot(self, texts: Sequence[str]) -> Tensor:
        """float32 ``[B, words]``, 1 where the sentence has the word or group."""
        out = torch.zeros(len(texts), len(self.names))
        for row, text in enumerate(texts):
            out[row, [self.names[w] for w in words(text, self.longest) if w in self.names]] = 1.0
        return out

    def ids(self, texts: Sequence[str]) -> Tensor:
        """int64 ``[B, L]``, the words in order; ``len(self)`` at unknown words and at the end."""
        rows = [torch.tensor([self.names.get(w, len(self)) for w in words(t, 1)] or [len(self)]) for t in texts]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=len(self))


class TextUNet(nn.Module):
    """MONAI's residual U-Net; with `codes` > 0 the sentence's multi-hot vector and the pixel's place are channels.

    The vector goes through a learned linear map; without the place a convolution could not tell left from right.
    """

    def __init__(self, size: int, channels: int, codes: int, width: int) -> None:
        super().__init__()
        self.text: nn.Linear | None = nn.Linear(codes, TEXT_CHANNELS) if codes else None
        extra = TEXT_CHANNELS + 2 if codes else 0
        widths = [width * 2**i for i in range(5)]
        self.unet = UNet(2, channels + extra, 1, widths, (2, 2, 2, 2), num_res_units=2, norm="batch")
        self.place: Tensor
        self.register_buffer("place", _place(size))

    def forward(self, image: Tensor, code: Tensor | None) -> Tensor:
        """See the module."""
        if self.text is not None:
            batch, _, height, width = image.shape
            flat = self.text(code)[:, :, None, None].expand(-1, -1, height, width)
            image = torch.cat([image, flat, self.place.expand(batch, -1, -1, -1)], 1)
        return self.unet(image.contiguous(memory_format=torch.channels_last))


class WordAttention(nn.Module):
    """Every pixel of a map attends to the sentence's words (as LViT's and LAVT's fusion, in its simplest form)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, WORD_DIM, 1)
        self.key_value = nn.Linear(WORD_DIM, WORD_DIM + channels)

    def forward(self, x: Tensor, tokens: Tensor, known: Tensor) -> Tensor:
        """`x` ``[B, C, H, W]``, `tokens` ``[B, L, E]``, `known` bool ``[B, L]``."""
        query = self.query(x).flatten(2).transpose(1, 2)
        key, value = self.key_value(tokens).split([WORD_DIM, x.shape[1]], -1)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=known[:, None])
        return x + mixed.transpose(1, 2).reshape(x.shape)


class WordAttentionUNet(nn.Module):
    """A residual U-Net whose two coarsest maps attend to the words, each read with its neighbours by a convolution."""

    def __init__(self, size: int, channels: int, codes: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(codes + 1, WORD_DIM, padding_idx=codes)
        self.context = nn.Conv1d(WORD_DIM, WORD_DIM, 3, padding=1)
        self.place: Tensor
        self.register_buffer("place", _place(size))
        widths = [width * 2**i for i in range(5)]
        before = [channels + 2, *widths[:-1]]
        options: dict[str, Any] = {"subunits": 2, "norm": "batch"}
        self.down = nn.ModuleList(ResidualUnit(2, a, b, strides=2, **options) for a, b in zip(before, widths))
        self.attention = nn.ModuleList(WordAttention(c) for c in widths[-2:])
        self.up = nn.ModuleList(
            ResidualUnit(2, a + b, b, strides=1, **options) for a, b in zip(widths[:0:-1], widths[-2::-1])
        )
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        """See the module."""
        known = ids < self.embed.num_embeddings - 1
        known[:, 0] |= ~known.any(1)
        tokens = self.embed(ids)
        tokens = tokens + F.relu(self.context(tokens.transpose(1, 2)).transpose(1, 2))
        x = torch.cat([image, self.place.expand(len(image), -1, -1, -1)], 1)
        x = x.contiguous(memory_format=torch.channels_last)
        maps = []
        for level, unit in enumerate(self.down):
            x = unit(x)
            coarse = level - (len(self.down) - len(self.attention))
            if coarse >= 0:
                x = self.attention[coarse](x, tokens, known)
            maps.append(x)
        for unit, finer in zip(self.up, maps[-2::-1]):
            x = unit(torch.cat([F.interpolate(x, size=finer.shape[2:]), finer], 1))
        return F.interpolate(self.head(x), scale_factor=2, mode="bilinear")


class ImageDynUNet(nn.Module):
    """MONAI's DynUNet as nnU-Net plans it for small two-dimensional images; it reads the image alone."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        filters = [min(width * 2**i, 512) for i in range(5)]
        self.net = DynUNet(2, channels, 1, [3] * 5, [1, 2, 2, 2, 2], [2] * 4, filters=filters, norm_name="instance")

    def forward(self, image: Tensor, code: Tensor | None) -> Tensor:
        """See the module."""
        return self.net(image.contiguous(memory_format=torch.channels_last))


def _place(size: int) -> Tensor:
    line = torch.linspace(-1, 1, size)
    return torch.stack(torch.meshgrid(line, line, indexing="ij"))[None]
