"""Encoders of other libraries: shapes, loading from this disk, errors, batch normalisation in training."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn
from transformers import ResNetConfig, ResNetModel

from ntpseg.models import NTPSegModel
from ntpseg.models.image_encoder import ResidualUnit
from ntpseg.models.pretrained_encoder import huggingface_encoder_config, load_encoder
from ntpseg.models.stem import FeatureStem, StemOptions

RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 12, 16],
    "depths": [1, 1, 1],
    "layer_type": "basic",
}


@pytest.fixture
def resnet(tmp_path):
    """A directory with a random Hugging Face ResNet whose batch statistics are not the initial ones."""
    torch.manual_seed(3)
    fields = {key: value for key, value in RESNET.items() if key != "model_type"}
    model = ResNetModel(ResNetConfig(**fields)).train()
    with torch.no_grad():
        model(torch.randn(4, 3, 32, 32))
    model.eval().save_pretrained(tmp_path / "resnet")
    return tmp_path / "resnet", model


def test_huggingface(resnet) -> None:
    path, source = resnet
    config = huggingface_encoder_config(path)
    encoder = load_encoder("huggingface", config).eval()
    assert encoder.widths == (8, 12, 16) and encoder.strides == (4, 8, 16)
    encoder.load_weights(path)
    grey = torch.rand(2, 1, 32, 32) * 2 - 1
    with torch.no_grad():
        maps = encoder(grey, None)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        pixels = ((grey + 1) / 2).repeat(1, 3, 1, 1)
        states = source((pixels - mean[:, None, None]) / std[:, None, None], output_hidden_states=True).hidden_states
        for got, expected in zip(maps, states[-3:], strict=True):
            torch.testing.assert_close(got, expected)
        for got, expected in zip(encoder(grey.expand(-1, 3, -1, -1), None), maps):
            torch.testing.assert_close(got, expected)


def test_a_missing_weight_is_named(resnet) -> None:
    from safetensors.torch import load_file, save_file

    path, _ = resnet
    encoder = load_encoder("huggingface", huggingface_encoder_config(path))
    weights = load_file(path / "model.safetensors")
    name = next(n for n in weights if n.endswith("convolution.weight"))
    save_file({n: w for n, w in weights.items() if n != name}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"must hold every weight of the encoder, got .* without '.*{name[-20:]}'"):
        encoder.load_weights(path)


def test_widths_that_the_group_size_does_not_divide() -> None:
    pytest.importorskip("monai")
    FeatureStem(StemOptions(encoder="monai:efficientnet-b4"), 1, 64, (8, 8), 16)  # 24, 32, 56, ...
    unit = ResidualUnit(56, 56, 1, 0, 16)
    assert unit.norm1.num_groups == 2 and ResidualUnit(8, 128, 1, 0, 16).norm2.num_groups == 8
    assert ResidualUnit(8, 53, 1, 0, 16).norm1.num_groups == 1


@pytest.mark.parametrize(
    ("name", "widths"), [("monai:resnet18", (64, 64, 128, 256, 512)), ("monai:efficientnet-b0", None)]
)
def test_monai(name, widths, tmp_path) -> None:
    pytest.importorskip("monai")
    encoder = load_encoder(name, None)
    assert encoder.strides == (2, 4, 8, 16, 32) and (widths is None or encoder.widths == widths)
    maps = encoder.eval()(torch.zeros(1, 1, 64, 64), None)
    assert [m.shape[1:] for m in maps] == [(w, 64 // s, 64 // s) for w, s in zip(encoder.widths, encoder.strides)]
    # A file with a classifier besides: what the encoder does not need is left out.
    weights = {n: torch.randn_like(w) if w.is_floating_point() else w for n, w in encoder.body.state_dict().items()}
    torch.save({**weights, "fc.weight": torch.zeros(3, 3)}, tmp_path / "weights.pt")
    encoder.load_weights(tmp_path / "weights.pt")
    for own, value in encoder.body.state_dict().items():
        assert torch.equal(value, weights[own]), own
    first = next(n for n in sorted(weights) if not n.endswith("num_batches_tracked"))
    torch.save({n: w for n, w in weights.items() if n != first}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=rf"got '.*weights.pt' without 1 of them, '{first}' first"):
        encoder.load_weights(tmp_path / "weights.pt")


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs timm")
def test_timm(tmp_path) -> None:
    encoder = load_encoder("timm:resnet18", None)
    assert encoder.strides == (2, 4, 8, 16, 32)
    torch.save(encoder.body.state_dict(), tmp_path / "weights.pt")
    encoder.load_weights(tmp_path / "weights.pt")


@pytest.fixture
def model_and_batch(make_feature_model, feature_batch):
    """A 4 x 4 stride: the finest of the encoder's maps."""
    stem = {"encoder": "huggingface", "encoder_config": RESNET, "widths": [8]}
    model, sequence = make_feature_model(stem=stem, dense_loss={"dice": 0.5})
    return model, feature_batch(sequence)


def test_batch_normalisation_keeps_its_state(model_and_batch) -> None:
    model, batch = model_and_batch
    norms = [m for m in model.front_end.stem.encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    before = {n: b.clone() for n, b in model.named_buffers()}
    model.train()
    assert norms and not any(norm.training for norm in norms) and model.front_end.stem.encoder.training
    together = model.encode_image(batch["pixel_values"], batch["input_ids"]).features
    alone = model.encode_image(batch["pixel_values"][:1], batch["input_ids"][:1]).features
    torch.testing.assert_close(together[:1], alone)
    loss = model(**batch).loss
    loss.backward()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert all(norm.weight.grad is not None for norm in norms)


def test_every_weight_gets_a_gradient(make_feature_model, feature_batch) -> None:
    """Of an encoder whose finest map is finer than the mask's grid as well."""
    model, sequence = make_feature_model(
        stem={"encoder": "huggingface", "encoder_config": RESNET, "widths": [8]},
        image_size=24,
        patch_size=8,
        dense_loss={"pixel": 1.0},
    )
    assert model.front_end.stem.encoder.strides == (4, 8, 16) and model.front_end.stem.top == 1
    batch = feature_batch(sequence)
    batch["pixel_values"] = torch.rand(3, 1, 24, 24)
    batch["mask_pixels"] = (torch.rand(3, 24, 24) < 0.5).float()
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_caption_that_nothing_reads_is_refused(make_feature_model) -> None:
    small = {**RESNET, "hidden_sizes": [8], "depths": [1]}
    stem = {"encoder": "huggingface", "encoder_config": small, "widths": [8]}
    with pytest.raises(ValueError, match=r"stem\.caption_dim must be 0 with 'huggingface' .* stride, 4, .* got 6"):
        make_feature_model(stem=stem)
    make_feature_model(stem={**stem, "caption_dim": 0})


def test_save_and_load(model_and_batch, resnet, tmp_path) -> None:
    model, batch = model_and_batch
    model.front_end.load_encoder_weights(resnet[0])
    model.eval().save_pretrained(tmp_path / "model")
    again = NTPSegModel.from_pretrained(tmp_path / "model")
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    inputs = {name: batch[name] for name in ("input_ids", "grid_ids", "pixel_values")}
    with torch.no_grad():
        one, two = (m(**inputs).last_hidden_state for m in (model, again))
    torch.testing.assert_close(one, two)


def test_wrong_input_is_named(tmp_path) -> None:
    for name, message in (
        ("resnet18", "stem.encoder must be residual, huggingface, timm:NAME or monai:NAME, got 'resnet18'"),
        ("monai:resnet19", r"stem.encoder must be monai: and one of .*, got 'resnet19'"),
        ("huggingface", "stem.encoder_config must hold a model_type for encoder 'huggingface', got None"),
    ):
        with pytest.raises(ValueError, match=message):
            load_encoder(name, None)
    if importlib.util.find_spec("timm") is None:
        with pytest.raises(ValueError, match=r"stem.encoder must be of an installed library, got 'timm:resnet18'"):
            load_encoder("timm:resnet18", None)
    with pytest.raises(ValueError, match="encoder weights must be a Hugging Face model's directory, got"):
        huggingface_encoder_config(tmp_path)
    encoder = load_encoder("monai:resnet18", None)
    with pytest.raises(ValueError, match=r"encoder weights must be a file of weights, got .* which is not there"):
        encoder.load_weights(tmp_path / "nothing.pt")
    with pytest.raises(ValueError, match=r"encoder weights must be .* got"):
        load_encoder("huggingface", RESNET).load_weights(tmp_path / "nothing")
