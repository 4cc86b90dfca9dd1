"""Which mask tokens the model reads in training: true ones, its own drafts, noise, or none at all.

A model that only ever reads true tokens learns to copy the last one and meets its own errors for the first time when it
decodes (exposure bias). Reading drafts is scheduled sampling (arXiv 1506.03099) without the sequential cost: a draft of
the whole mask comes from one pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ntpseg.utils.checks import check_number

BLANK = -1


@dataclass(frozen=True)
class MaskInputOptions:
    """How the mask codes that are read in training differ from the true ones; all shares are in [0, 1].

    Attributes:
        replaced: largest share of a sequence's codes that is replaced; each sequence draws its own from 0 to it.
        draft: share of the replaced codes that come from a draft of the model itself; the others are noise, half of
            it codes of other cells of the same mask, half random codes.
        blank: share of the sequences that read no mask code at all, only blanks: the one-pass read-out is trained so.
        second_pass: share of the sequences whose draft is the model's own one-pass read-out (a second forward pass of
            the decoder, without gradient) instead of the stem's.
    """

    replaced: float = 1.0
    draft: float = 0.7
    blank: float = 0.3
    second_pass: float = 0.0

    def __post_init__(self) -> None:
        for name in ("replaced", "draft", "blank", "second_pass"):
            check_number(f"mask_inputs.{name}", getattr(self, name), 0, 1)


def mask_inputs(codes: Tensor, draft: Tensor | None, num_codes: int, options: MaskInputOptions) -> Tensor:
    """The mask codes to be read instead of the true ones, `BLANK` where none is.

    Args:
        codes: int64 ``[B, N]``, the true codes.
        draft: int64 ``[B, N]``, the model's own; None: noise takes its share.
        num_codes: V.
        options: see `MaskInputOptions`.

    Returns:
        int64 ``[B, N]``.
    """
    batch, cells = codes.shape
    device = codes.device

    def chosen(share: float | Tensor, *shape: int) -> Tensor:
        return torch.rand(*shape, device=device) < share

    shuffled = codes[:, torch.randperm(cells, device=device)]
    random = torch.randint(num_codes, (batch, cells), device=device)
    other = torch.where(chosen(0.5, batch, cells), shuffled, random)
    if draft is not None:
        other = torch.where(chosen(options.draft, batch, cells), draft, other)
    replaced = chosen(torch.rand(batch, 1, device=device) * options.replaced, batch, cells)
    read = torch.where(replaced, other, codes)
    return torch.where(chosen(options.blank, batch, 1), BLANK, read)
