"""What a vision tokenizer offers, whichever it is, and how a directory becomes one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class VisionTokenizer(Protocol):
    """Square images and masks to grids of codes and back; frozen, never on the autograd tape.

    Images are float [B, C, S, S] in [-1, 1], masks float [B, 1, S, S] in {0, 1}; codes are int64 [B, h, w].
    """

    image_size: int
    channels: int
    factor: int
    image_grid: tuple[int, int]
    mask_grid: tuple[int, int]
    image_codes: int
    mask_codes: int
    shared_codebook: bool

    def encode_image(self, x: Tensor) -> Tensor:
        """Codes, int64 [B, h, w], of images, float [B, C, S, S] in [-1, 1]."""
        ...

    def encode_mask(self, x: Tensor) -> Tensor:
        """Codes, int64 [B, h, w], of masks, float [B, 1, S, S] in {0, 1}."""
        ...

    def decode_image(self, codes: Tensor) -> Tensor:
        """Images, float [B, C, S, S] in [-1, 1], of codes, int64 [B, h, w]."""
        ...

    def decode_mask(self, codes: Tensor) -> Tensor:
        """Mask probabilities, float [B, 1, S, S] in [0, 1], of codes, int64 [B, h, w]; threshold them at 0.5."""
        ...

    def image_codebook(self) -> Tensor:
        """Float [image_codes, e]."""
        ...

    def mask_codebook(self) -> Tensor:
        """Float [mask_codes, e]; the image codebook itself when it is shared."""
        ...

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a directory that `load_vision_tokenizer` reads."""
        ...

    def to(self, device: torch.device | str) -> Any:
        """Move the weights; inputs follow them, outputs stay there."""
        ...

    def fingerprint(self) -> str:
        """A hash of everything that decides the codes: equal fingerprints give equal codes."""
        ...


def load_vision_tokenizer(directory: str | Path, image_size: int | None = None) -> VisionTokenizer:
    """Load a vision tokenizer from a local directory: ours (`CompactVQ`) or Hugging Face's `Emu3VQVAE`.

    Args:
        directory: holds config.json and model.safetensors.
        image_size: side of the square input in pixels. A directory that this package wrote knows it; Emu3's own, which
            takes any size, needs it.

    Raises:
        ValueError: no such directory, an unknown kind of model, or an image size that is missing or contradicts it.
    """
    path = Path(directory)
    config = path / "config.json"
    if not config.is_file():
        raise ValueError(f"vision tokenizer directory {str(path)!r} has no config.json; it must hold a saved tokenizer")
    try:
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{config} is not valid JSON ({error}); it must be a model's configuration") from error
    tokenizer: VisionTokenizer
    if model_type == "ntpseg_compact_vq":
        from ntpseg.tokenizers.compact import CompactVQ

        tokenizer = CompactVQ.from_pretrained(path)
        if image_size is not None and image_size != tokenizer.image_size:
            raise ValueError(
                f"image_size is {image_size}; it must be {tokenizer.image_size}, what the tokenizer was trained at"
            )
    elif model_type == "emu3_vqgan":
        from ntpseg.tokenizers.emu3 import Emu3Vision

        tokenizer = Emu3Vision.from_pretrained(path, image_size=image_size)
    else:
        raise ValueError(
            f"{config} says model_type {model_type!r}; it must be 'ntpseg_compact_vq' or 'emu3_vqgan' "
            "(a whole Emu3 model holds its Emu3VQVAE as `vqmodel`: save that one by itself)"
        )
    return tokenizer


def check_images(x: Tensor, channels: int, size: int, name: str) -> None:
    """Raise a `ValueError` unless `x` is float [B, channels, size, size]."""
    if x.dim() != 4 or tuple(x.shape[1:]) != (channels, size, size) or not torch.is_floating_point(x):
        raise ValueError(
            f"{name} is {x.dtype} of shape {tuple(x.shape)}; it must be float of shape (B, {channels}, {size}, {size})"
        )


def check_codes(codes: Tensor, grid: tuple[int, int], size: int, name: str) -> None:
    """Raise a `ValueError` unless `codes` is integer [B, *grid] in ``[0, size)``."""
    if codes.dim() != 3 or tuple(codes.shape[1:]) != grid or torch.is_floating_point(codes):
        shape = f"(B, {grid[0]}, {grid[1]})"
        raise ValueError(f"{name} is {codes.dtype} of shape {tuple(codes.shape)}; it must be integers of shape {shape}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= size):
        raise ValueError(f"{name} spans {int(codes.min())} .. {int(codes.max())}; it must lie in 0 .. {size - 1}")
