"""A small residual convolutional encoder of the image, conditioned on the caption."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Convolution(nn.Conv2d):
    """A convolution that is drawn as PyTorch draws it, and not from the normal of the decoder around it."""

    def init_weights(self, uniform_: Callable[..., Any], zeros_: Callable[..., Any]) -> None:
        """Draw the weights.

        Args:
            uniform_, zeros_: ``transformers.initialization``'s, which leave alone what was loaded from a checkpoint.
        """
        bound = 1 / math.sqrt(self.weight[0].numel())
        uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            uniform_(self.bias, -bound, bound)


class CaptionModulation(nn.Linear):
    """Scale and shift of every channel by the caption's vector (FiLM, arXiv 1709.07871); starts as the identity."""

    def reset_parameters(self) -> None:
        """Zeros."""
        self.init_weights(nn.init.uniform_, nn.init.zeros_)

    def init_weights(self, uniform_: Callable[..., Any], zeros_: Callable[..., Any]) -> None:
        """Zeros, see `Convolution.init_weights`."""
        zeros_(self.weight)
        zeros_(self.bias)


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions with group normalisation; the caption scales and shifts the second one's output.

    Group rather than batch normalisation: a sample's result depends neither on its batch nor on how the batch is
    divided over accumulation steps and ranks. The shortcut averages before
    its 1x1 convolution where it has to shrink (ResNet-D, arXiv 1812.01187).

    Args:
        channels_in, channels: C_in and C.
        stride: 1 or 2.
        caption_dim: E of the caption's vector; 0 for none.
        group_size: least channels of a normalisation group; more where C does not divide.
    """

    def __init__(self, channels_in: int, channels: int, stride: int, caption_dim: int, group_size: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = Convolution(channels_in, channels, 3, stride, 1, bias=False)
        most = max(1, channels // group_size)
        # A pretrained encoder's widths are no multiples of the group's.
        groups = next(count for count in range(most, 0, -1) if channels % count == 0)
        self.norm1 = nn.GroupNorm(groups, channels)
        self.conv2 = Convolution(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(groups, channels)
        plain = stride == 1 and channels_in == channels
        self.shortcut = nn.Identity() if plain else Convolution(channels_in, channels, 1)
        self.film = CaptionModulation(caption_dim, 2 * channels) if caption_dim else None

    def forward(self, x: Tensor, caption: Tensor | None, image_of: Tensor | None = None) -> Tensor:
        """``[B, C_in, H, W]`` and ``[B, E]`` in, ``[B, C, ceil(H / stride), ceil(W / stride)]`` out.

        With `image_of`, int64 ``[B]``, `x` is ``[U, C_in, H, W]``: what no caption changes is computed once an image.
        """
        h = F.relu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        if self.stride > 1:
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        shortcut = self.shortcut(x)
        if image_of is not None:
            h, shortcut = h[image_of], shortcut[image_of]
        if self.film is not None and caption is not None:
            scale, shift = self.film(caption)[:, :, None, None].chunk(2, 1)
            h = torch.addcmul(h + shift, h, scale)
        return F.relu(h + shortcut)


class ResidualPyramid(nn.Module):
    """The encoder that is trained from nothing: pixels folded into channels, then one residual level per halving.

    Two channels with the pixel's place are added to the image, since convolutions alone cannot tell left from right.

    Args:
        channels: C of the image.
        patch: p, pixels folded into channels along each side.
        widths: channels of each level; level l has stride ``p * 2^(l + 1)``.
        depth: residual units of a level.
        caption_dim, group_size: see `ResidualUnit`.

    Attributes:
        widths: channels of the returned maps.
        strides: pixels per cell of the returned maps.
    """

    def __init__(
        self, channels: int, patch: int, widths: tuple[int, ...], depth: int, caption_dim: int, group_size: int
    ) -> None:
        super().__init__()
        self.patch, self.widths = patch, tuple(widths)
        self.strides = tuple(patch * 2 ** (level + 1) for level in range(len(widths)))
        before = (channels * patch**2 + 2, *widths[:-1])
        self.levels = nn.ModuleList(
            nn.ModuleList(
                ResidualUnit(width if unit else narrow, width, 1 if unit else 2, caption_dim, group_size)
                for unit in range(depth)
            )
            for narrow, width in zip(before, widths)
        )

    def forward(self, image: Tensor, caption: Tensor | None, image_of: Tensor | None = None) -> list[Tensor]:
        """Maps ``[B, widths[l], H / strides[l], W / strides[l]]`` of images ``[B, C, H, W]``, the finest first.

        With `image_of`, int64 ``[B]``, the images are ``[U, C, H, W]`` and row b reads the one at ``image_of[b]``.
        """
        x = F.pixel_unshuffle(image, self.patch)
        vertical = torch.linspace(-1, 1, x.shape[2], device=x.device, dtype=x.dtype)[:, None].expand(x.shape[2:])
        horizontal = torch.linspace(-1, 1, x.shape[3], device=x.device, dtype=x.dtype)[None].expand(x.shape[2:])
        place = torch.stack([horizontal, vertical]).expand(len(x), -1, -1, -1)
        x = torch.cat([x, place], 1).contiguous(memory_format=torch.channels_last)
        maps = []
        for level in self.levels:
            for unit in level:  # type: ignore[attr-defined]
                x = unit(x, caption, image_of)
                image_of = None  # the caption has been read: from here on every row is its own
            maps.append(x)
        return maps
