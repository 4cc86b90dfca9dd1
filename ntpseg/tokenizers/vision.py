"""The interface of a vision tokenizer, and the checks of its arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class VisionSizes(Protocol):
    """What sequences and models depend on of a vision tokenizer.

    Attributes:
        image_size: S, side of images and masks, pixels.
        channels: C of images.
        factor: pixels of a code along each side.
        image_grid, mask_grid: rows and columns of codes.
        image_codes, mask_codes: sizes of the codebooks.
        shared_codebook: both are one.
    """

    image_size: int
    channels: int
    factor: int
    image_grid: tuple[int, int]
    mask_grid: tuple[int, int]
    image_codes: int
    mask_codes: int
    shared_codebook: bool


class VisionTokenizer(VisionSizes, Protocol):
    """Square images and masks to grids of codes and back; frozen, never on the autograd tape.

    Images are float [B, C, S, S] in [-1, 1], masks float [B, 1, S, S] in {0, 1}; codes are int64 [B, h, w].
    """

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

    def mask_patches(self) -> Tensor:
        """Float [mask_codes, factor, factor] in [0, 1]: the foreground probability of the patch of each code alone."""
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


def check_images(x: Tensor, channels: int, size: int, name: str) -> None:
    """Raise a `ValueError` unless `x` is float [B, channels, size, size]."""
    if x.dim() != 4 or tuple(x.shape[1:]) != (channels, size, size) or not torch.is_floating_point(x):
        raise ValueError(
            f"{name} must be a float [B, {channels}, {size}, {size}] tensor, got {x.dtype} {list(x.shape)}"
        )


def check_codes(codes: Tensor, grid: tuple[int, int], size: int, name: str) -> None:
    """Raise a `ValueError` unless `codes` is integer [B, *grid] in ``[0, size)``."""
    if codes.dim() != 3 or tuple(codes.shape[1:]) != grid or torch.is_floating_point(codes):
        shape = f"[B, {grid[0]}, {grid[1]}]"
        raise ValueError(f"{name} must be an integer {shape} tensor, got {codes.dtype} {list(codes.shape)}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= size):
        low, high = int(codes.min()), int(codes.max())
        raise ValueError(f"{name} must be within [0, {size}), got values from {low} to {high}")
