"""Image encoders of other libraries: the architecture by name, the weights from this disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# ImageNet's statistics, of pixels in [0, 1]: what these encoders were trained with.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PROBE_SIZE = 64


class PretrainedEncoder(nn.Module):
    """An encoder of another library behind `ResidualPyramid`'s interface; the caption does not reach into it.

    Grey images are repeated to RGB and normalised by ImageNet's statistics. Batch normalisation keeps its saved
    statistics in training, so that a result does not depend on the batch.

    Args:
        body: takes ``[B, 3, H, W]`` and returns maps, the finest first.

    Attributes:
        widths: channels of the returned maps.
        strides: pixels per cell of the returned maps.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("mean", torch.tensor(_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(_STD)[:, None, None])
        training = body.training
        with torch.no_grad():
            maps = body.eval()(torch.zeros(1, 3, _PROBE_SIZE, _PROBE_SIZE, device=self.mean.device))
        body.train(training)
        self.widths = tuple(m.shape[1] for m in maps)
        self.strides = tuple(_PROBE_SIZE // m.shape[2] for m in maps)

    def forward(self, image: Tensor, caption: Tensor | None) -> list[Tensor]:
        """Maps of images ``[B, C, H, W]`` in [-1, 1], C = 1 or 3; `caption` is not used."""
        pixels = ((image + 1) / 2).expand(-1, 3, -1, -1)
        return list(self.body((pixels - self.mean) / self.std))

    def train(self, mode: bool = True) -> PretrainedEncoder:
        """Training mode for all but the batch normalisation."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def load_weights(self, path: str | Path) -> None:
        """Load the weights of this architecture from a safetensors or PyTorch file, or a Hugging Face directory.

        Raises:
            ValueError: no such file, or it lacks a weight; ones that the encoder does not need (a classifier's) are
                left out.
        """
        source = Path(path).expanduser()
        if isinstance(self.body, _HuggingFaceBody):
            self.body.load(source)
            return
        if not source.is_file():
            raise ValueError(f"encoder weights must be a file of weights, got {str(source)!r}, which is not there")
        if source.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights = load_file(source)
        else:
            weights = torch.load(source, map_location="cpu", weights_only=True)
        own = self.body.state_dict()
        lacking = sorted(name for name in own if name not in weights and not name.endswith("num_batches_tracked"))
        if lacking:
            raise ValueError(
                f"encoder weights must hold every weight of the encoder, got {str(source)!r} without "
                f"{len(lacking)} of them, {lacking[0]!r} first"
            )
        self.body.load_state_dict({name: weights.get(name, own[name]) for name in own})


def load_encoder(name: str, config: dict[str, Any] | None) -> PretrainedEncoder:
    """The architecture of a pretrained encoder, with random weights; see `PretrainedEncoder.load_weights`.

    Args:
        name: "timm:resnet18" (any timm model with ``features_only``), "monai:resnet18" or "monai:efficientnet-b0" (any
            of MONAI's FlexibleUNet backbones), or "huggingface".
        config: of "huggingface": the fields of the model's config.json, with ``model_type``.

    Raises:
        ValueError: an unknown name, or the library is not installed.
    """
    library, _, model = name.partition(":")
    makers: dict[str, Callable[[], nn.Module]] = {
        "timm": lambda: _timm(model),
        "monai": lambda: _monai(model),
        "huggingface": lambda: _HuggingFaceBody(config),
    }
    if library not in makers:
        raise ValueError(f"stem.encoder must be residual, huggingface, timm:NAME or monai:NAME, got {name!r}")
    try:
        return PretrainedEncoder(makers[library]())
    except ImportError as error:
        raise ValueError(f"stem.encoder must be of an installed library, got {name!r} ({error})") from error


def huggingface_encoder_config(directory: str | Path) -> dict[str, Any]:
    """The config.json of a local Hugging Face model, what `load_encoder` takes.

    Raises:
        ValueError: there is none.
    """
    path = Path(directory).expanduser() / "config.json"
    if not path.is_file():
        raise ValueError(f"encoder weights must be a Hugging Face model's directory, got {str(directory)!r}")
    return json.loads(path.read_text(encoding="utf-8"))


class _HuggingFaceBody(nn.Module):
    """Any backbone that ``AutoBackbone`` knows, all its stages."""

    def __init__(self, config: dict[str, Any] | None) -> None:
        super().__init__()
        from transformers import AutoBackbone, AutoConfig

        if not config or "model_type" not in config:
            raise ValueError(f"stem.encoder_config must hold a model_type for encoder 'huggingface', got {config!r}")
        fields = {key: value for key, value in config.items() if key not in ("out_features", "out_indices")}
        made: Any = AutoConfig.for_model(fields.pop("model_type"), **fields)
        made.out_features = [stage for stage in made.stage_names if stage != "stem"]
        self.backbone: Any = AutoBackbone.from_config(made, trust_remote_code=False)

    def forward(self, image: Tensor) -> list[Tensor]:
        return list(self.backbone(image).feature_maps)

    def load(self, directory: Path) -> None:
        if not directory.is_dir():
            raise ValueError(f"encoder weights must be a Hugging Face model's directory, got {str(directory)!r}")
        # Not AutoBackbone's: it asks the hub whether there is a repository of this name.
        loaded, report = type(self.backbone).from_pretrained(
            str(directory),
            config=self.backbone.config,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        missing = sorted(report["missing_keys"])
        if missing:
            raise ValueError(
                f"encoder weights must hold every weight of the encoder, got {str(directory)!r} without {missing[0]!r}"
            )
        self.backbone.load_state_dict(loaded.state_dict())


def _timm(name: str) -> nn.Module:
    import timm

    try:
        return timm.create_model(name, pretrained=False, features_only=True)
    except RuntimeError as error:
        raise ValueError(f"stem.encoder must be a timm model with features_only, got {name!r} ({error})") from error


def _monai(name: str) -> nn.Module:
    from monai.networks.nets.flexible_unet import FLEXUNET_BACKBONE

    known = FLEXUNET_BACKBONE.register_dict
    if name not in known:
        raise ValueError(f"stem.encoder must be monai: and one of {', '.join(known)}, got {name!r}")
    entry = known[name]
    options = {**entry["parameter"], "pretrained": False, "spatial_dims": 2, "in_channels": 3}
    return entry["type"](**options)
