"""A still image costs one frame, and its codes are those of the model's own `encode`."""

from __future__ import annotations

import pytest
import torch

from ntpseg.tokenizers import still_image
from ntpseg.tokenizers.still_image import encode_still, nearest_codes


@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize("side", [32, 40])
def test_codes_are_those_of_the_model(frames, side):
    from transformers import Emu3VQVAE, Emu3VQVAEConfig

    torch.manual_seed(frames)
    config = Emu3VQVAEConfig(
        codebook_size=300,
        embed_dim=4,
        latent_channels=4,
        base_channels=32,
        channel_multiplier=[1, 2, 2],
        num_res_blocks=2,
        attn_resolutions=[2],
        hidden_size=64,
        temporal_downsample_factor=frames,
    )
    model = Emu3VQVAE(config).eval()
    images = torch.randn(3, 3, side, side)
    seen = []
    model.encoder.conv_in.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    with torch.no_grad():
        expected = torch.stack(list(model.encode(images, image_sizes=torch.tensor([[side, side]] * 3)).image_tokens))
        result = encode_still(model, images)
    assert torch.equal(result, expected) and result.unique().numel() > 10
    assert seen == [3 * frames, 3]


@pytest.mark.parametrize("stored", [1, 700, 2**23])
def test_the_nearest_code_is_found_in_parts(stored, monkeypatch):
    monkeypatch.setattr(still_image, "_DISTANCES", stored)
    codebook, latents = torch.randn(70, 4), torch.randn(123, 4)
    codebook[50] = codebook[3]  # the first of equal ones counts
    latents[7] = codebook[3]
    expected = torch.cdist(latents.double(), codebook.double()).argmin(1)
    result = nearest_codes(latents, codebook)
    assert torch.equal(result, expected) and result[7] == 3
    assert nearest_codes(latents[:0], codebook).shape == (0,)
