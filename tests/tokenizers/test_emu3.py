"""A tiny random `Emu3VQVAE`, saved to disk and read back as a user's would be."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ntpseg.tokenizers.auto import load_vision_tokenizer
from ntpseg.tokenizers.emu3 import Emu3Vision
from ntpseg.tokenizers.vision import VisionTokenizer


def config(**changes):
    from transformers import Emu3VQVAEConfig

    sizes = {
        "codebook_size": 64,
        "embed_dim": 4,
        "latent_channels": 4,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "hidden_size": 32,
        "temporal_downsample_factor": 1,
    }
    return Emu3VQVAEConfig(**{**sizes, **changes})


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory as `Emu3VQVAE.save_pretrained` writes it; factor 4."""
    from transformers import Emu3VQVAE

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("emu3")
    Emu3VQVAE(config()).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def vision(directory):
    return load_vision_tokenizer(directory, image_size=32)


def test_it_keeps_the_protocol(vision, ellipses):
    assert isinstance(vision, VisionTokenizer)
    assert (vision.factor, vision.channels, vision.image_grid) == (4, 3, (8, 8))
    assert vision.shared_codebook
    assert vision.image_codes == vision.mask_codes == 64
    images, masks = ellipses(3, 32, 3)
    codes = vision.encode_image(images)
    assert codes.dtype == torch.int64
    assert codes.shape == (3, 8, 8)
    assert codes.unique().numel() > 1
    assert vision.decode_image(codes).shape == images.shape
    probability = vision.decode_mask(vision.encode_mask(masks))
    assert probability.shape == masks.shape
    assert 0 <= probability.min() <= probability.max() <= 1
    assert vision.image_codebook().shape == (64, 4)
    assert torch.equal(vision.image_codebook(), vision.mask_codebook())


def test_codes_are_those_of_the_model_itself(vision, ellipses):
    images, masks = ellipses(2, 32, 3)
    sizes = torch.tensor([[32, 32]] * 2)
    own = vision.model.encode(images, image_sizes=sizes).image_tokens
    assert torch.equal(vision.encode_image(images), torch.stack(list(own)))
    picture = masks.expand(-1, 3, -1, -1) * 2 - 1
    assert torch.equal(vision.encode_mask(masks), torch.stack(list(vision.model.encode(picture, sizes).image_tokens)))


def test_an_outer_train_call_does_not_change_the_codes(vision, ellipses):
    images, _ = ellipses(4, 32, 3)
    codes = vision.encode_image(images)
    vision.model.train()
    assert torch.equal(vision.encode_image(images), codes)
    vision.model.train()
    assert torch.equal(vision.decode_image(codes), vision.decode_image(codes))


def test_several_batches_give_the_codes_of_one(vision, ellipses, monkeypatch):
    images, _ = ellipses(5, 32, 3)
    codes = vision.encode_image(images)
    monkeypatch.setattr("ntpseg.tokenizers.emu3._BATCH_PIXELS", 2 * 32 * 32)
    assert vision._batch == 2
    assert torch.equal(vision.encode_image(images), codes)
    assert torch.allclose(vision.decode_image(codes[:3]), vision.decode_image(codes)[:3], atol=1e-5)


def test_normalisation_follows_the_directorys_processor(directory, tmp_path, ellipses):
    import shutil

    images, _ = ellipses(2, 32, 3)
    plain = load_vision_tokenizer(directory, image_size=32)
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    mean, std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    (copy / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    other = load_vision_tokenizer(copy, image_size=32)
    pixels = (images + 1) / 2
    as_normalised = ((pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)).float()
    sizes = torch.tensor([[32, 32]] * 2)
    expected = torch.stack(list(other.model.encode(as_normalised, image_sizes=sizes).image_tokens))
    assert torch.equal(other.encode_image(images), expected)
    assert other.fingerprint() != plain.fingerprint()


def test_saved_again_it_knows_its_size(vision, tmp_path, ellipses):
    vision.save_pretrained(tmp_path)
    loaded = load_vision_tokenizer(tmp_path)
    images, _ = ellipses(2, 32, 3)
    assert loaded.fingerprint() == vision.fingerprint()
    assert torch.equal(loaded.encode_image(images), vision.encode_image(images))
    with pytest.raises(ValueError, match=r"image_size must be 32, .* got 64"):
        load_vision_tokenizer(tmp_path, image_size=64)


def test_four_frames_and_one_channel_work(ellipses):
    from transformers import Emu3VQVAE

    model = Emu3VQVAE(config(temporal_downsample_factor=4, in_channels=1, out_channels=1))
    vision = Emu3Vision(model, 16)
    images, masks = ellipses(1, 16)
    codes = vision.encode_image(images)
    assert codes.shape == (1, 4, 4)
    assert vision.decode_image(codes).shape == images.shape
    assert vision.decode_mask(vision.encode_mask(masks)).shape == masks.shape


def test_wrong_directories_are_named(directory, tmp_path):
    import shutil

    with pytest.raises(ValueError, match="image_size must be given"):
        load_vision_tokenizer(directory)
    with pytest.raises(ValueError, match="image_size must be a multiple of factor, 4, got 30"):
        load_vision_tokenizer(directory, image_size=30)
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    weights = load_file(copy / "model.safetensors")
    del weights["quantize.embedding.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, 'quantize.embedding.weight' first"):
        load_vision_tokenizer(copy, image_size=32)
    (copy / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_vision_tokenizer(copy, image_size=32)
