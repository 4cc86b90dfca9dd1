"""Hugging Face's `Emu3VQVAE` (the paper's vision tokenizer) behind this package's protocol.

One codebook serves image and mask: a mask is a picture with -1 for background and 1 for foreground in all channels. The
model is kept in evaluation mode for good, because its batch normalisation changes 17 % of the codes in training mode.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntpseg.tokenizers.still_image import encode_still
from ntpseg.tokenizers.vision import check_codes, check_images
from ntpseg.utils.checks import check_multiple, one_line
from ntpseg.utils.files import write_json

if TYPE_CHECKING:
    from transformers import Emu3VQVAE

_SETTINGS_FILE = "ntpseg_vision.json"
_PROCESSOR_FILE = "preprocessor_config.json"
# Pixels of one forward pass, frames included: bounds the activations of the full-size model to a few gigabytes.
_BATCH_PIXELS = 2**20


class Emu3Vision:
    """`Emu3VQVAE` at one square image size; satisfies `VisionTokenizer`.

    Args:
        model: the autoencoder; it is frozen and put into evaluation mode.
        image_size: side S of the square input in pixels, a multiple of the model's spatial factor.
        mean, std: per-channel statistics that the model's input was normalised with, of pixels in [0, 1]; 0.5 both in
            Emu3's own repository.

    Raises:
        ValueError: an image size that the factor does not divide, or statistics for another number of channels.
    """

    shared_codebook = True

    def __init__(
        self,
        model: Emu3VQVAE,
        image_size: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        config = model.config
        self.factor = 2 ** (len(config.channel_multiplier) - 1)
        # The model would round any other size down without a word.
        check_multiple("image_size", image_size, "factor", self.factor)
        self.channels = config.in_channels
        self.mean = tuple(mean) if mean is not None else (0.5,) * self.channels
        self.std = tuple(std) if std is not None else (0.5,) * self.channels
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels or (name == "std" and min(values) <= 0):
                raise ValueError(f"{name} must hold {self.channels} numbers (std: > 0), got {values}")
        self.model = model.eval().requires_grad_(False)
        self.image_size = image_size
        self.image_grid = self.mask_grid = (image_size // self.factor,) * 2
        self.image_codes = self.mask_codes = config.codebook_size

    @property
    def device(self) -> torch.device:
        """Where the weights are; inputs are moved there."""
        return self.model.device

    def to(self, device: torch.device | str) -> Emu3Vision:
        """Move the weights."""
        self.model.to(device)  # type: ignore[arg-type]  # transformers hides the signature of `to`
        return self

    def _statistics(self) -> tuple[Tensor, Tensor]:
        shape = (1, self.channels, 1, 1)
        mean, std = (torch.tensor(values, device=self.device).view(shape) for values in (self.mean, self.std))
        return mean, std

    @property
    def _batch(self) -> int:
        return max(1, _BATCH_PIXELS // (self.image_size**2 * self.model.config.temporal_downsample_factor))

    @torch.no_grad()
    def encode_image(self, x: Tensor) -> Tensor:
        """Codes, int64 [B, h, w], of images, float [B, C, S, S] in [-1, 1]."""
        check_images(x, self.channels, self.image_size, "x")
        mean, std = self._statistics()
        self.model.eval()
        codes = [torch.empty(0, *self.image_grid, dtype=torch.int64, device=self.device)]
        # one frame an image here, and all of them only where they are smallest
        for part in x.to(self.device, torch.float32).split(max(1, _BATCH_PIXELS // self.image_size**2)):
            normalised = ((part + 1) / 2 - mean) / std
            codes.append(encode_still(self.model, normalised))
        return torch.cat(codes)

    def encode_mask(self, x: Tensor) -> Tensor:
        """Codes, int64 [B, h, w], of masks, float [B, 1, S, S] in {0, 1}."""
        check_images(x, 1, self.image_size, "x")
        return self.encode_image((x * 2 - 1).expand(-1, self.channels, -1, -1))

    @torch.no_grad()
    def decode_image(self, codes: Tensor) -> Tensor:
        """Images, float [B, C, S, S] in [-1, 1], of codes, int64 [B, h, w]."""
        check_codes(codes, self.image_grid, self.image_codes, "codes")
        mean, std = self._statistics()
        self.model.eval()
        images = [torch.empty(0, self.channels, self.image_size, self.image_size, device=self.device)]
        for part in codes.to(self.device).long().split(self._batch):
            images.append((self.model.decode(part) * std + mean) * 2 - 1)
        return torch.cat(images).clamp(-1, 1)

    def decode_mask(self, codes: Tensor) -> Tensor:
        """Mask probabilities, float [B, 1, S, S] in [0, 1]: the decoded picture's mean over channels."""
        return (self.decode_image(codes).mean(1, keepdim=True) + 1) / 2

    def image_codebook(self) -> Tensor:
        """Float [image_codes, e]."""
        return self.model.quantize.embedding.weight.detach()

    def mask_codebook(self) -> Tensor:
        """The image codebook: there is one."""
        return self.image_codebook()

    @torch.no_grad()
    def mask_patches(self) -> Tensor:
        """Float [mask_codes, factor, factor] in [0, 1]: the middle of what 3 x 3 times the same code decode to."""
        mean, std = self._statistics()
        self.model.eval()
        size, patches = self.factor, []
        for codes in torch.arange(self.mask_codes, device=self.device).split(max(1, _BATCH_PIXELS // (3 * size) ** 2)):
            picture = self.model.decode(codes[:, None, None].expand(-1, 3, 3).contiguous()) * std + mean
            patches.append(picture.mean(1)[:, size : 2 * size, size : 2 * size])
        return torch.cat(patches).clamp(0, 1)

    @cached_property
    def _fingerprint(self) -> str:
        settings = [self.model.config.model_type, self.image_size, self.mean, self.std]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 over size, statistics and every weight."""
        return self._fingerprint

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the model in Hugging Face's format, and this package's settings beside it."""
        path = Path(directory)
        self.model.save_pretrained(path)
        settings = {"image_size": self.image_size, "image_mean": list(self.mean), "image_std": list(self.std)}
        write_json(path / _SETTINGS_FILE, settings)

    @classmethod
    def from_pretrained(cls, directory: str | Path, image_size: int | None = None) -> Emu3Vision:
        """Load a local `Emu3VQVAE` directory.

        Image size and statistics come from what `save_pretrained` wrote; a plain Hugging Face directory needs
        `image_size`, and its preprocessor_config.json gives the statistics (0.5 where there is none).

        Raises:
            ValueError: a missing or contradicting image size, or weights that are damaged or incomplete.
        """
        from transformers import Emu3VQVAE

        path = Path(directory)
        saved = _read_json(path / _SETTINGS_FILE)
        settings = saved or _read_json(path / _PROCESSOR_FILE)
        size = saved.get("image_size", image_size)
        if size is None:
            raise ValueError("image_size must be given, since an Emu3VQVAE takes any size, got None")
        if image_size is not None and image_size != size:
            raise ValueError(f"image_size must be {size}, as in {path / _SETTINGS_FILE}, got {image_size}")
        try:
            loaded: Any = Emu3VQVAE.from_pretrained(
                path, local_files_only=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
            )
            model, report = loaded
        except Exception as error:
            raise ValueError(
                "vision tokenizer directory must hold config.json and model.safetensors of an Emu3VQVAE, "
                f"got {str(path)!r}, which cannot be loaded ({one_line(error)})"
            ) from error
        for key, reason in (("missing_keys", "lacks"), ("unexpected_keys", "has"), ("mismatched_keys", "has other")):
            names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in report[key])
            if names:
                # transformers only warns, and goes on with random weights.
                raise ValueError(
                    "vision tokenizer directory must hold all weights of an Emu3VQVAE and no others, got "
                    f"{str(path)!r}, which {reason} {len(names)} weights, {names[0]!r} first"
                )
        return cls(model, size, settings.get("image_mean"), settings.get("image_std"))


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}
