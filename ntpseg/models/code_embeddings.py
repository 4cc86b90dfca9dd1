"""First embeddings of the visual codes, made of a vision tokenizer's codebooks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ntpseg.models.config import NTPSegConfig


def code_embeddings(
    config: NTPSegConfig,
    width: int,
    image_codebook: Tensor | None,
    mask_codebook: Tensor,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Embeddings of the codes from their codebooks, so that codes that look alike start alike.

    Each codebook is standardised, projected to `width` by a random Gaussian matrix and scaled to the initialiser's
    standard deviation.

    Args:
        config: has the ranges of codes and ``initializer_range``.
        width: D, of the embeddings.
        image_codebook, mask_codebook: ``[codes, e]`` float, as a vision tokenizer gives them; None without image codes.
        generator: source of the projections.

    Yields:
        The first id of a range and its embeddings, ``[codes, D]`` float32 on the CPU. A range of both image and mask
        codes comes once, of the image's codebook.

    Raises:
        ValueError: the configuration has no ranges of codes, or a codebook of another size.
    """
    for name, codebook in (("image", image_codebook), ("mask", mask_codebook)):
        if codebook is None:
            continue
        span = getattr(config, f"{name}_range")
        if span is None:
            raise ValueError(f"{name}_range of the configuration must be set to place the {name} codes, got None")
        if codebook.dim() != 2 or codebook.shape[0] != span[1] - span[0]:
            raise ValueError(
                f"{name}_codebook must be [{span[1] - span[0]}, e], as in {name}_range, got {list(codebook.shape)}"
            )
        code = codebook.detach().float().cpu()
        code = (code - code.mean(0)) / code.std(0, correction=0).clamp_min(1e-6)
        projection = torch.randn(code.shape[1], width, generator=generator) / code.shape[1] ** 0.5
        yield span[0], code @ projection * config.initializer_range
        if name == "image" and list(span) == config.mask_range:
            return
