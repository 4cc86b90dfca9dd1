"""From the distribution over mask codes to pixels and back."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PatchReadout(nn.Module):
    """The patch of each mask code, and with it the expected patch of a distribution over codes.

    A decoded sequence of codes is one mask; the expected patch is the foreground probability of every pixel, which is
    what a threshold for Dice wants.

    Args:
        codes: number V of mask codes.
        factor: P, pixels of a patch's side.

    Attributes:
        patches: ``[V, P * P]`` in [0, 1], see `VisionTokenizer.mask_patches`.
    """

    patches: Tensor

    def __init__(self, codes: int, factor: int) -> None:
        super().__init__()
        self.register_buffer("patches", torch.zeros(codes, factor**2))

    @torch.no_grad()
    def set_patches(self, patches: Tensor) -> None:
        """Take over ``[V, P, P]``.

        Raises:
            ValueError: another number of codes or pixels.
        """
        if patches.flatten(1).shape != self.patches.shape:
            raise ValueError(
                f"patches must hold {self.patches.shape[0]} codes of {self.patches.shape[1]} pixels, "
                f"got {list(patches.shape)}"
            )
        self.patches.copy_(patches.flatten(1))

    def expected(self, logits: Tensor) -> Tensor:
        """``[..., P * P]`` expected patches, in [0, 1], of logits ``[..., V]``."""
        # Autocast would round the probabilities of a whole mask to 8 bits.
        with torch.autocast(logits.device.type, enabled=False):
            return logits.softmax(-1) @ self.patches.to(logits.dtype)

    def nearest(self, patches: Tensor) -> Tensor:
        """The codes, int64 ``[...]``, whose patches are nearest to ``[..., P * P]`` (Euclidean; ties to the lowest)."""
        book = self.patches.to(patches.dtype)
        return (patches @ book.T - 0.5 * book.square().sum(1)).argmax(-1)

    def similarity(self, temperature: float) -> Tensor:
        """``[V, V]``: row y is ``softmax(-|patch_y - patch_v|_1 / temperature)``, distances in pixels."""
        return torch.softmax(-torch.cdist(self.patches, self.patches, p=1) / temperature, -1)
