"""The compact tokenizer: quality on unseen pictures, exact ends, locality, determinism, files, speed of search."""

from __future__ import annotations

import json

import pytest
import torch

from ntpseg.tokenizers.auto import load_vision_tokenizer
from ntpseg.tokenizers.compact import CompactVQ, CompactVQOptions
from ntpseg.tokenizers.compact_training import train_compact_vq
from ntpseg.tokenizers.vision import VisionTokenizer

TINY = CompactVQOptions(image_codes=16, mask_codes=8, steps=4, batch_size=4, width=8, codebook_steps=2)


def psnr(image, truth):
    return float(10 * torch.log10(4 / (image - truth).square().mean()))


def test_unseen_masks_and_images_survive_the_round_trip(compact, ellipses, dice):
    assert isinstance(compact, VisionTokenizer)
    images, masks = ellipses(40, 64, seed=1)
    mask_codes, image_codes = compact.encode_mask(masks), compact.encode_image(images)
    assert mask_codes.dtype == image_codes.dtype == torch.int64
    assert mask_codes.shape == image_codes.shape == (40, 8, 8)
    probability = compact.decode_mask(mask_codes)
    assert probability.shape == masks.shape
    assert 0 <= probability.min() <= probability.max() <= 1
    assert dice(probability, masks) > 0.95
    decoded = compact.decode_image(image_codes)
    assert decoded.shape == images.shape
    # An image of the mean grey alone is the floor to beat.
    assert psnr(decoded, images) > psnr(images.mean().expand_as(images), images) + 6


def test_training_the_decoder_beats_kmeans_alone(ellipses):
    images, masks = ellipses(80, 64)
    unseen, _ = ellipses(20, 64, seed=2)
    kmeans = CompactVQOptions(image_codes=32, mask_codes=16, steps=0)
    trained = CompactVQOptions(image_codes=32, mask_codes=16, steps=80, batch_size=16, width=32)
    quality = []
    for options in (kmeans, trained):
        model = train_compact_vq(images, masks, options, progress=False)
        quality.append(psnr(model.decode_image(model.encode_image(unseen)), unseen))
    assert quality[1] > quality[0] + 0.3


def test_empty_and_full_masks_are_codes_0_and_1_and_come_back_exactly(compact):
    ends = torch.stack([torch.zeros(1, 64, 64), torch.ones(1, 64, 64)])
    codes = compact.encode_mask(ends)
    assert (codes[0] == 0).all()
    assert (codes[1] == 1).all()
    assert torch.equal((compact.decode_mask(codes) > 0.5).float(), ends)


def test_a_code_depends_on_its_own_patch_only(compact, ellipses):
    images, _ = ellipses(1, 64, seed=3)
    changed = images.clone()
    changed[..., 16:24, 40:48] = 1.0
    differs = (compact.encode_image(images) != compact.encode_image(changed))[0].nonzero()
    assert differs.tolist() == [[2, 5]]


def test_search_gives_the_quantizer_librarys_codes(compact, ellipses):
    images, _ = ellipses(5, 64, seed=4)
    latent = compact.image.analysis(images).permute(0, 2, 3, 1).flatten(0, 2)
    _, codes, _ = compact.image.quantizer.eval()(latent[None])
    assert torch.equal(compact.encode_image(images).flatten(), codes.flatten())


def test_training_is_deterministic_and_leaves_the_global_generator_alone(ellipses):
    images, masks = ellipses(12, 32)
    state = torch.get_rng_state()
    first = train_compact_vq(images, masks, TINY, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    assert train_compact_vq(images, masks, TINY, progress=False).fingerprint() == first.fingerprint()
    other = CompactVQOptions(**{**TINY.__dict__, "seed": 1})
    assert train_compact_vq(images, masks, other, progress=False).fingerprint() != first.fingerprint()


def test_inputs_are_not_written_to(ellipses):
    images, masks = ellipses(6, 32)
    before = images.clone(), masks.clone()
    train_compact_vq(images, masks, TINY, progress=False)
    assert torch.equal(images, before[0])
    assert torch.equal(masks, before[1])


@pytest.mark.parametrize(("factor", "channels"), [(4, 1), (16, 3), (8, 3)])
def test_every_factor_and_channel_count(factor, channels, ellipses):
    images, masks = ellipses(6, 32, channels)
    options = CompactVQOptions(**{**TINY.__dict__, "factor": factor})
    model = train_compact_vq(images, masks, options, progress=False)
    grid = 32 // factor
    assert model.image_grid == model.mask_grid == (grid, grid)
    codes = model.encode_image(images)
    assert codes.shape == (6, grid, grid)
    assert model.decode_image(codes).shape == images.shape
    assert model.decode_mask(model.encode_mask(masks)).shape == masks.shape
    assert model.image_codebook().shape[0] == 16
    assert model.mask_codebook().shape[0] == 8


def test_masks_without_any_boundary_train(ellipses, dice):
    images, _ = ellipses(3, 32)
    masks = torch.stack([torch.zeros(1, 32, 32), torch.ones(1, 32, 32), torch.zeros(1, 32, 32)])
    model = train_compact_vq(images, masks, TINY, progress=False)
    assert dice(model.decode_mask(model.encode_mask(masks)), masks) == 1.0


def test_large_sets_are_subsampled(ellipses):
    images, masks = ellipses(30, 32)
    options = CompactVQOptions(**{**TINY.__dict__, "max_images": 5})
    model = train_compact_vq(images, masks, options, progress=False)
    assert model.fingerprint() != train_compact_vq(images, masks, TINY, progress=False).fingerprint()


def test_saved_tokenizer_loads_with_the_same_codes_and_fingerprint(compact, tmp_path, ellipses):
    compact.save_pretrained(tmp_path)
    loaded = load_vision_tokenizer(tmp_path, image_size=64)
    images, masks = ellipses(4, 64, seed=5)
    assert loaded.fingerprint() == compact.fingerprint()
    assert torch.equal(loaded.encode_image(images), compact.encode_image(images))
    assert torch.equal(loaded.decode_mask(loaded.encode_mask(masks)), compact.decode_mask(compact.encode_mask(masks)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_damaged_directories_are_named(compact, tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json"):
        load_vision_tokenizer(tmp_path)
    compact.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"image_size must be 64, .* got 32"):
        load_vision_tokenizer(tmp_path, image_size=32)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_vision_tokenizer(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "emu3"}))
    with pytest.raises(ValueError, match=r"model_type of .* got 'emu3'"):
        load_vision_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="got invalid JSON"):
        load_vision_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode_image(torch.zeros(1, 3, 64, 64)), r"must be a float \[B, 1, 64, 64\] tensor"),
        (lambda m: m.encode_mask(torch.zeros(1, 1, 64, 64, dtype=torch.bool)), "x must be .* got torch.bool"),
        (
            lambda m: m.decode_mask(torch.full((1, 8, 8), 64)),
            r"codes must be within \[0, 64\), got .* 64 to 64",
        ),
        (lambda m: m.decode_image(torch.zeros(1, 64, dtype=torch.long)), r"integer \[B, 8, 8\]"),
        (lambda m: CompactVQ(30, 1), "image_size must be a multiple of factor, 8, got 30"),
        (lambda m: CompactVQ(32, 2), "channels must be one of 1, 3, got 2"),
        (lambda m: CompactVQOptions(factor=7), "factor must be one of 4, 8, 16, got 7"),
        (lambda m: CompactVQOptions(mask_codes=2), "mask_codes must be an integer >= 4, got 2"),
        (lambda m: CompactVQOptions(learning_rate=0.0), "learning_rate must be a number > 0, got 0.0"),
        (lambda m: train_compact_vq(torch.zeros(2, 1, 8, 8), torch.zeros(3, 1, 8, 8)), "masks must be"),
        (lambda m: train_compact_vq(torch.zeros(0, 1, 8, 8), torch.zeros(0, 1, 8, 8)), "N >= 1"),
        (lambda m: train_compact_vq(torch.zeros(1, 1, 8, 8), torch.full((1, 1, 8, 8), 255.0)), "must be binary"),
        (lambda m: train_compact_vq(torch.full((1, 1, 8, 8), 9.0), torch.zeros(1, 1, 8, 8)), r"within \[-1, 1\]"),
    ],
)
def test_wrong_input_is_named(compact, call, message):
    with pytest.raises(ValueError, match=message):
        call(compact)


def mostly_black(count):
    generator = torch.Generator().manual_seed(0)
    images = torch.full((count, 1, 32, 32), -1.0)
    images[::4] = torch.rand(len(images[::4]), 1, 32, 32, generator=generator)
    return images, (images > 0.5).float()


def test_a_common_patch_does_not_use_up_the_codebook():
    """Three pictures in four are black: uniform k-means seeds would make most codes copies of one."""
    images, masks = mostly_black(40)
    options = CompactVQOptions(**{**TINY.__dict__, "image_codes": 32, "codebook_steps": 0})
    model = train_compact_vq(images, masks, options, progress=False)
    assert model.image_codebook().unique(dim=0).shape[0] == 32
