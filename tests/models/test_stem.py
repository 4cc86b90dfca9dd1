"""The stem: shapes, strides, independence of the batch, FiLM, and how features and captions reach the decoder."""

from __future__ import annotations

import pytest
import torch

from ntpseg.models.caption import CaptionEncoder
from ntpseg.models.grid import next_cell
from ntpseg.models.image_encoder import ResidualPyramid, ResidualUnit
from ntpseg.models.stem import FeatureStem, StemOptions


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("depth", [1, 2])
def test_pyramid_shapes_and_strides(patch: int, depth: int) -> None:
    pyramid = ResidualPyramid(3, patch, (8, 12, 16), depth, caption_dim=5, group_size=4)
    assert pyramid.strides == (2 * patch, 4 * patch, 8 * patch)
    maps = pyramid(torch.randn(2, 3, 32, 32), torch.randn(2, 5))
    for level, width in enumerate((8, 12, 16)):
        side = 32 // pyramid.strides[level]
        assert maps[level].shape == (2, width, side, side)


@pytest.mark.parametrize(("size", "grid"), [(32, 8), (32, 4), (32, 2), (24, 3)])
def test_stem_shapes(size: int, grid: int) -> None:
    """At the finest, a middle and the coarsest level, and where the coarsest map has half a cell."""
    options = StemOptions(widths=(8, 12, 16), caption_dim=5, group_size=4)
    stem = FeatureStem(options, 1, size, (grid, grid), 10)
    out = stem(torch.randn(2, 1, size, size), torch.randn(2, 5))
    assert out.features.shape == (2, grid**2, 10)
    assert out.draft.shape == (2, grid**2, (size // grid) ** 2)
    (out.features.sum() + out.draft.sum()).backward()
    assert all(p.grad is not None for p in stem.parameters()), "an unused weight stops data-parallel training"


def test_cells_are_row_major() -> None:
    stem = FeatureStem(StemOptions(widths=(8, 12), caption_dim=0), 1, 16, (4, 4), 6)
    maps = []
    for conv in (stem.features, stem.draft):
        conv.register_forward_hook(lambda module, inputs, output: maps.append(output))
    out = stem(torch.randn(2, 1, 16, 16), None)
    for cells, picture in zip((out.features, out.draft), maps):
        for row in range(4):
            for column in range(4):
                assert torch.equal(cells[:, 4 * row + column], picture[:, :, row, column])


def test_a_result_does_not_depend_on_its_batch() -> None:
    stem = FeatureStem(StemOptions(widths=(8, 12), caption_dim=5, group_size=4), 1, 16, (4, 4), 6).train()
    images, captions = torch.randn(4, 1, 16, 16), torch.randn(4, 5)
    together = stem(images, captions)
    for row in range(4):
        alone = stem(images[row : row + 1], captions[row : row + 1])
        torch.testing.assert_close(alone.features[0], together.features[row])
        torch.testing.assert_close(alone.draft[0], together.draft[row])


def test_film_starts_as_the_identity_and_then_conditions(make_feature_model) -> None:
    model, _ = make_feature_model()
    units = [m for m in model.modules() if isinstance(m, ResidualUnit)]
    assert len(units) == 3
    stem, image = model.front_end.stem, torch.randn(2, 1, 12, 12)
    plain, other = torch.zeros(2, 6), torch.randn(2, 6)
    with torch.no_grad():
        assert torch.equal(stem(image, plain).features, stem(image, other).features)
        x = torch.randn(2, units[1].conv1.in_channels, 6, 6)
        assert torch.equal(units[1](x, other), units[1](x, None))
        for unit in units:
            torch.nn.init.normal_(unit.film.weight)
        assert not torch.allclose(stem(image, plain).features, stem(image, other).features)
        # scale and shift of the normalised second convolution, by hand
        scale, shift = units[1].film(other)[:, :, None, None].chunk(2, 1)
        unit = units[1]
        h = unit.norm2(unit.conv2(torch.relu(unit.norm1(unit.conv1(x)))))
        short = unit.shortcut(torch.nn.functional.avg_pool2d(x, 2) if unit.stride > 1 else x)
        torch.testing.assert_close(unit(x, other), torch.relu(h * (1 + scale) + shift + short))


def test_convolutions_are_drawn_as_pytorch_draws_them(make_feature_model) -> None:
    """And not from the decoder's normal, whose deviation of 0.02 suits embeddings."""
    stem = make_feature_model(stem={"widths": [32, 64], "group_size": 16})[0].front_end.stem
    for conv in (m for m in stem.modules() if isinstance(m, torch.nn.Conv2d)):
        bound = conv.weight[0].numel() ** -0.5
        assert conv.weight.abs().max() <= bound
        assert conv.weight.std() > 0.5 * bound
    for norm in (m for m in stem.modules() if isinstance(m, torch.nn.GroupNorm)):
        assert (norm.weight == 1).all() and (norm.bias == 0).all()


def test_caption_ignores_what_is_no_text() -> None:
    encoder = CaptionEncoder(8, 6, 4)
    embeds = torch.randn(1, 5, 8)
    text = torch.tensor([[False, True, True, True, False]])
    alone = encoder(embeds, text)
    behind = torch.cat([embeds, torch.randn(1, 7, 8)], 1)
    behind[:, 0] = torch.randn(8)
    behind[:, 4] = torch.randn(8)
    torch.testing.assert_close(encoder(behind, torch.nn.functional.pad(text, (0, 7))), alone)
    assert not torch.allclose(encoder(embeds.flip(1), text), alone), "the order of the words is read"
    empty = encoder(embeds, torch.zeros_like(text))
    assert torch.equal(empty[0], encoder.project.bias)


def test_labels_cut_the_sequence_without_changing_the_caption(make_feature_model, feature_batch) -> None:
    model, sequence = make_feature_model()
    model.eval()
    with torch.no_grad():
        for module in model.front_end.stem.modules():
            if isinstance(module, ResidualUnit):
                torch.nn.init.normal_(module.film.weight)
    batch = feature_batch(sequence, (1, 9, 0))
    pixels = {"pixel_values": batch["pixel_values"], "grid_ids": batch["grid_ids"]}
    with torch.no_grad():
        without = model(batch["input_ids"], **pixels).last_hidden_state
        cut = model(batch["input_ids"], labels=batch["labels"], **pixels).last_hidden_state
        # each prompt alone, as decoding reads it
        for row, words in enumerate((1, 9, 0)):
            alone = model.encode_image(
                batch["pixel_values"][row : row + 1], batch["input_ids"][row : row + 1, : words + 2]
            )
            whole = model.encode_image(batch["pixel_values"], batch["input_ids"])
            torch.testing.assert_close(alone.features[0], whole.features[row])
        captions = batch["input_ids"].clone()
        captions[1, 3] = (captions[1, 3] + 1) % 40
        other = model(captions, **pixels).last_hidden_state
    torch.testing.assert_close(cut, without)
    assert not torch.allclose(other[1], without[1]) and torch.equal(other[0], without[0])


def test_next_cell() -> None:
    """Image cells 1..4, mask cells 5..8: the token of mask cell c predicts c + 1, the query token cell 0."""
    grid = torch.tensor([[0, 1, 4, 0, 0, 5, 6, 7, 8, 0]])
    query = torch.tensor([[False] * 4 + [True] + [False] * 5])
    assert next_cell(grid, query, 4, 4).tolist() == [[4, 4, 4, 4, 0, 1, 2, 3, 4, 4]]


@pytest.mark.parametrize("front_end", ["features", "both"])
def test_aligned_features_stand_where_their_cell_is_predicted(make_feature_model, feature_batch, front_end) -> None:
    model, sequence = make_feature_model(front_end)
    batch = feature_batch(sequence)
    features = torch.randn(3, 9, 32)
    zero = torch.zeros_like(features)
    ids, grid = batch["input_ids"], batch["grid_ids"]
    with torch.no_grad():
        added = model.embed(ids, grid, features) - model.embed(ids, grid, zero)
    for row in range(3):
        first = int((batch["labels"][row] != -100).int().argmax())
        for position in range(ids.shape[1]):
            cell = position - (first - 1)
            expected = features[row, cell] if 0 <= cell < 9 else torch.zeros(32)
            torch.testing.assert_close(added[row, position], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("front_end", ["features", "both"])
def test_features_that_are_not_aligned_stand_in_the_prompt(make_feature_model, feature_batch, front_end) -> None:
    model, sequence = make_feature_model(front_end, aligned=False)
    batch = feature_batch(sequence)
    features = torch.randn(3, 9, 32)
    ids, grid = batch["input_ids"], batch["grid_ids"]
    with torch.no_grad():
        added = model.embed(ids, grid, features) - model.embed(ids, grid, torch.zeros_like(features))
    for row, words in enumerate((2, 5, 3)):
        for position in range(ids.shape[1]):
            cell = position - (words + 2)  # BOS, text, BOI
            expected = features[row, cell] if 0 <= cell < 9 else torch.zeros(32)
            torch.testing.assert_close(added[row, position], expected, atol=1e-6, rtol=1e-5)


def test_wrong_input_is_named(make_feature_model, feature_batch, make_model) -> None:
    for fields, message in (
        ({"patch": 3}, r"stem\.patch must be one of 1, 2, 4, 8, got 3"),
        ({"widths": (8, 0)}, r"stem\.widths must be an integer >= 1, got 0"),
        ({"widths": (34,)}, None),
        ({"widths": (33,)}, r"stem\.widths must be .* got 33"),
        ({"depth": 0}, r"stem\.depth must be an integer >= 1, got 0"),
        ({"caption_dim": -1}, r"stem\.caption_dim must be an integer >= 0, got -1"),
    ):
        if message is None:
            StemOptions(**fields)
            continue
        with pytest.raises(ValueError, match=message):
            StemOptions(**fields)
    with pytest.raises(ValueError, match=r"level of the mask tokens' stride, 16, got strides \[4, 8\]"):
        FeatureStem(StemOptions(widths=(8, 8)), 1, 32, (2, 2), 8)
    with pytest.raises(ValueError, match=r"stem\.encoder must be residual, .* got 'resnet'"):
        FeatureStem(StemOptions(encoder="resnet"), 1, 32, (2, 2), 8)
    model, sequence = make_feature_model()
    batch = feature_batch(sequence)
    ids, grid = batch["input_ids"], batch["grid_ids"]
    with pytest.raises(ValueError, match=r"pixel_values must be \[3, 1, 12, 12\], got None"):
        model(ids, grid_ids=grid)
    with pytest.raises(ValueError, match=r"pixel_values must be \[3, 1, 12, 12\], got \[2, 1, 12, 12\]"):
        model(ids, grid_ids=grid, pixel_values=batch["pixel_values"][:2])
    with pytest.raises(ValueError, match=r"grid_ids must be \[3, 17\], as input_ids is, got None"):
        model(ids, pixel_values=batch["pixel_values"])
    with pytest.raises(ValueError, match="features must be given with front_end 'features', got None"):
        model.embed(ids, grid)
    with pytest.raises(ValueError, match="front_end must be features or both for pixels to be read, got 'codes'"):
        make_model().encode_image(batch["pixel_values"], ids)
    with pytest.raises(ValueError, match=r"stem\.encoder must be a pretrained one .* got 'residual'"):
        model.front_end.load_encoder_weights("somewhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"front_end": "pixels"}, "front_end must be one of codes, features, both, got 'pixels'"),
        ({"patch_size": 0}, "patch_size, mask_grid, mask_range and blank_token must be given with front_end, got 0"),
        ({"blank_token": -1}, "blank_token must be given with front_end"),
        ({"image_size": 16}, r"image_size must be mask_grid times patch_size, \[12, 12\], got 16"),
        ({"stem": {"aligned": False}}, "image_grid must be mask_grid, .* with stem.aligned False, got None"),
        ({"front_end": "codes", "dense_loss": {"pixel": 1.0}}, "dense_loss.pixel must be 0 with front_end 'codes'"),
        ({"dense_loss": {"dice": -1.0}}, "dense_loss.dice must be a number >= 0, got -1.0"),
        ({"mask_inputs": {"blank": 2.0}}, "mask_inputs.blank must be a number >= 0 and <= 1, got 2.0"),
    ],
)
def test_wrong_configurations_are_named(make_feature_model, change, message) -> None:
    from ntpseg.models import NTPSegConfig

    fields = make_feature_model()[0].config.to_dict() | change
    with pytest.raises(ValueError, match=message):
        NTPSegConfig(**fields)
