"""`CompactVQ`: a small vision tokenizer that trains in about a minute on a CPU.

Image and mask have a branch of their own (`PatchVQ`): own axes, own codebook, own decoder. Mask code 0 is all
background and mask code 1 all foreground, exactly.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ntpseg.tokenizers.patch_vq import PatchVQ
from ntpseg.tokenizers.vision import check_codes, check_images
from ntpseg.utils.checks import check_choice, check_integer, check_multiple, check_number, one_line
from ntpseg.utils.files import atomic_write, write_json

MODEL_TYPE = "ntpseg_compact_vq"
FACTORS = (4, 8, 16)
# The logit of a pixel that every patch of a code agrees on is half of this.
MASK_GAIN = 6.0


@dataclass(frozen=True)
class CompactVQOptions:
    """Size and training of a `CompactVQ`.

    Attributes:
        factor: pixels per code along each side: 4, 8 or 16.
        image_codes: size of the image codebook; 0: the tokenizer has no image branch.
        mask_codes: size of the mask codebook, all background and all foreground included.
        dim: length of a latent (fewer where a patch has fewer pixels).
        width: channels of the decoders.
        depth: residual convolutions of the decoders.
        steps: decoder training steps for each branch; 0 leaves k-means on patches.
        batch_size: images a step.
        learning_rate: peak of the one-cycle schedule (AdamW).
        codebook_patches: patches that k-means sees.
        codebook_steps: EMA steps, with dead-code restart, after k-means.
        max_images: larger sets are subsampled to this many pairs.
        seed: of everything random.
    """

    factor: int = 8
    image_codes: int = 512
    mask_codes: int = 256
    dim: int = 32
    width: int = 64
    depth: int = 1
    steps: int = 300
    batch_size: int = 32
    learning_rate: float = 2e-3
    codebook_patches: int = 30_000
    codebook_steps: int = 30
    max_images: int = 4000
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("factor", self.factor, FACTORS)
        minimum = {
            "image_codes": 2,
            "mask_codes": 4,
            "dim": 1,
            "width": 1,
            "depth": 0,
            "steps": 0,
            "batch_size": 1,
            "codebook_patches": 1,
            "codebook_steps": 0,
            "max_images": 1,
        }
        if self.image_codes == 0:
            del minimum["image_codes"]
        for name, value in minimum.items():
            check_integer(name, getattr(self, name), value)
        check_number("learning_rate", self.learning_rate, above=0)


class CompactVQ(nn.Module):
    """The compact vision tokenizer; satisfies `VisionTokenizer`.

    Args:
        image_size: side S of the square input in pixels, a multiple of the factor.
        channels: 1 (grey) or 3 (RGB).
        options: see `CompactVQOptions`.

    Raises:
        ValueError: an image size that the factor does not divide, or another number of channels.
    """

    shared_codebook = False

    def __init__(self, image_size: int, channels: int, options: CompactVQOptions | None = None) -> None:
        super().__init__()
        options = options or CompactVQOptions()
        check_multiple("image_size", image_size, "factor", options.factor)
        check_choice("channels", channels, (1, 3))
        self.options = options
        self.image_size = image_size
        self.channels = channels
        self.factor = options.factor
        self.image_grid = self.mask_grid = (image_size // options.factor,) * 2
        self.image_codes = options.image_codes
        self.mask_codes = options.mask_codes

        def branch(channels: int, codes: int) -> PatchVQ:
            dim = min(options.dim, channels * options.factor**2)
            return PatchVQ(channels, options.factor, codes, dim, options.width, options.depth)

        self.image = branch(channels, options.image_codes) if options.image_codes else None
        self.mask = branch(1, options.mask_codes)
        self.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are; inputs are moved there."""
        return self.mask.base.weight.device

    @torch.no_grad()
    def encode_image(self, x: Tensor) -> Tensor:
        """Codes, int64 [B, h, w], of images, float [B, C, S, S] in [-1, 1]."""
        check_images(x, self.channels, self.image_size, "x")
        return self._image_branch.encode(x.to(self.device, torch.float32))

    @torch.no_grad()
    def encode_mask(self, x: Tensor) -> Tensor:
        """Codes, int64 [B, h, w], of masks, float [B, 1, S, S] in {0, 1}."""
        check_images(x, 1, self.image_size, "x")
        return self.mask.encode(x.to(self.device, torch.float32))

    @torch.no_grad()
    def decode_image(self, codes: Tensor) -> Tensor:
        """Images, float [B, C, S, S] in [-1, 1], of codes, int64 [B, h, w]."""
        check_codes(codes, self.image_grid, self.image_codes, "codes")
        return self._image_branch.decode(codes.to(self.device).long()).clamp(-1, 1)

    @torch.no_grad()
    def decode_mask(self, codes: Tensor) -> Tensor:
        """Mask probabilities, float [B, 1, S, S] in [0, 1], of codes, int64 [B, h, w]."""
        check_codes(codes, self.mask_grid, self.mask_codes, "codes")
        return self.mask.decode(codes.to(self.device).long()).sigmoid()

    def image_codebook(self) -> Tensor:
        """Float [image_codes, e]."""
        return self._image_branch.codebook

    def mask_codebook(self) -> Tensor:
        """Float [mask_codes, e]."""
        return self.mask.codebook

    @torch.no_grad()
    def mask_patches(self) -> Tensor:
        """Float [mask_codes, factor, factor] in [0, 1]."""
        return self.mask.patches().clamp(0, 1).unflatten(1, (self.factor, self.factor))

    @property
    def _image_branch(self) -> PatchVQ:
        if self.image is None:
            raise ValueError("image_codes must be above 0 for images to be tokenised, got 0")
        return self.image

    def _config(self) -> dict[str, Any]:
        return {
            "model_type": MODEL_TYPE,
            "image_size": self.image_size,
            "channels": self.channels,
            "options": asdict(self.options),
        }

    def fingerprint(self) -> str:
        """SHA-256 over size, channels and every weight."""
        digest = hashlib.sha256(json.dumps([MODEL_TYPE, self.image_size, self.channels, self.factor]).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors."""
        path = Path(directory)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        atomic_write(path / "model.safetensors", save(weights))
        write_json(path / "config.json", self._config())

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> CompactVQ:
        """Load what `save_pretrained` wrote.

        Raises:
            ValueError: a file is missing or damaged, or the weights do not fit the configuration.
        """
        path = Path(directory)
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            model = cls(config["image_size"], config["channels"], CompactVQOptions(**config["options"]))
            weights = load_file(path / "model.safetensors")
            for name, branch in (("image", model.image), ("mask", model.mask)):
                # Not saved before version 0.2; where the decoder was not trained this is what it was.
                if branch is not None and f"{name}.mean" not in weights:
                    gain, centre = (MASK_GAIN, 0.5) if name == "mask" else (1.0, 0.0)
                    weights[f"{name}.mean"] = weights[f"{name}.base.bias"] / gain + centre
            model.load_state_dict(weights)
        except Exception as error:
            raise ValueError(
                f"vision tokenizer directory must hold what CompactVQ.save_pretrained wrote, got {str(path)!r}, "
                f"which cannot be loaded ({one_line(error)})"
            ) from error
        return model
