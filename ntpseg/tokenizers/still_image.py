"""Encoding a still image with `Emu3VQVAE`, a video model, without the work of a video.

The model repeats an image to `temporal_downsample_factor` equal frames. What works on one frame at a time (nearly all
of it) gives equal results for equal frames, so one is enough up to the temporal convolutions. The nearest code is found
for some positions at a time, so that no matrix of all positions by all codes is ever stored.

Reference: ``model.encode(images, image_sizes).image_tokens``, whose codes these are; the layers are transformers' own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import Emu3VQVAE

# Distances that exist at a time: 32 MiB in float32, which stays within a processor's caches or is nothing to a GPU.
_DISTANCES = 2**23


def encode_still(model: Emu3VQVAE, images: Tensor) -> Tensor:
    """Codes, int64 [B, h, w], of normalised images, [B, C, H, W] with sides that the model's factor divides."""
    images = images.to(model.dtype)
    frames = model.config.temporal_downsample_factor
    encoder = model.encoder
    x = encoder.conv_in(images)
    x = encoder.middle_block(encoder.down_block(x))
    x = encoder.norm_out(x)
    x = encoder.conv_out(x * torch.sigmoid(x))
    x = x.unsqueeze(2).expand(-1, -1, frames, -1, -1)
    for convolution in encoder.time_conv:
        x = convolution(x)
        x = x * torch.sigmoid(x)
    for layer in encoder.time_res_stack:
        x = layer(x)
    latents = model.quant_conv(x).squeeze(2).movedim(1, -1)
    return nearest_codes(latents.flatten(0, -2), model.quantize.embedding.weight).view(latents.shape[:-1])


def nearest_codes(latents: Tensor, codebook: Tensor) -> Tensor:
    """Index, int64 [N], of the entry of a codebook [K, e] that is nearest to each of some vectors [N, e].

    The distance is written as transformers writes it, in this order of operations: ties and rounding fall alike.
    """
    length = (codebook**2).sum(1)
    found = torch.empty(len(latents), dtype=torch.int64, device=latents.device)
    size = max(1, _DISTANCES // len(codebook))
    for start in range(0, len(latents), size):
        part = latents[start : start + size]
        distance = (part**2).sum(1, keepdim=True) + length
        distance = distance.sub_(2 * torch.matmul(part, codebook.t()))
        torch.argmin(distance, dim=1, out=found[start : start + size])
    return found
