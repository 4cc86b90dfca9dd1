"""The image front end ``features``: an encoder and a neck that give every mask cell a feature and a first draft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntpseg.models.image_encoder import Convolution, ResidualPyramid, ResidualUnit
from ntpseg.models.pretrained_encoder import load_encoder
from ntpseg.utils.checks import check_choice, check_integer

FRONT_ENDS = ("codes", "features", "both")


@dataclass(frozen=True)
class StemOptions:
    """Size of a `FeatureStem`.

    Attributes:
        encoder: "residual", trained from nothing, or a pretrained one by name, see `load_encoder`.
        encoder_config: of encoder "huggingface": the fields of its config.json.
        patch: pixels folded into channels along each side before the first level ("residual").
        widths: channels of the levels ("residual"); of the neck's levels as well.
        depth: residual units of a level.
        caption_dim: length of the caption's vector that conditions the convolutions; 0 switches conditioning off.
        caption_hidden: channels of the caption's encoder.
        group_size: channels of a normalisation group.
        aligned: add a cell's feature to the token that predicts the cell; False gives the features positions of their
            own in the prompt, where image tokens would stand (for comparison: it learns far more slowly).

    Raises:
        ValueError: a size below 1.
    """

    encoder: str = "residual"
    encoder_config: dict[str, Any] | None = None
    patch: int = 2
    widths: tuple[int, ...] = (32, 64, 128, 128)
    depth: int = 1
    caption_dim: int = 64
    caption_hidden: int = 128
    group_size: int = 16
    aligned: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        check_choice("stem.patch", self.patch, (1, 2, 4, 8))
        check_integer("stem.caption_dim", self.caption_dim, 0)
        for name in ("depth", "group_size", "caption_hidden"):
            check_integer(f"stem.{name}", getattr(self, name), 1)
        for width in self.widths:
            check_integer("stem.widths", width, 1)
            if width % max(1, width // self.group_size):
                raise ValueError(f"stem.widths must be multiples of group_size, {self.group_size}, got {width}")


class StemOutput(NamedTuple):
    """What a `FeatureStem` returns for B images, the cells of the mask grid row-major.

    Attributes:
        features: ``[B, cells, D]``, added to the token that predicts the cell.
        draft: ``[B, cells, P * P]``, logits of the pixels of each cell's patch.
    """

    features: Tensor
    draft: Tensor


class FeatureStem(nn.Module):
    """Features and a draft of the mask for every cell of the mask grid, from the pixels and the caption.

    An encoder makes maps of several strides; the neck goes from the coarsest back up to the grid, as a U-Net's decoder
    (arXiv 1505.04597) that stops where a pixel is a mask token.

    Args:
        options: see `StemOptions`.
        channels: C of the image.
        image_size: S, pixels of a side.
        mask_grid: rows and columns of the mask tokens.
        dim: width D of the model.

    Raises:
        ValueError: no map of the encoder has the mask grid's stride, or the caption would not be read.
    """

    def __init__(
        self, options: StemOptions, channels: int, image_size: int, mask_grid: tuple[int, int], dim: int
    ) -> None:
        super().__init__()
        self.mask_grid = mask_grid
        factor = image_size // mask_grid[0]
        encoder: Any
        if options.encoder == "residual":
            encoder = ResidualPyramid(
                channels, options.patch, options.widths, options.depth, options.caption_dim, options.group_size
            )
        else:
            encoder = load_encoder(options.encoder, options.encoder_config)
        self.encoder = encoder
        if factor not in encoder.strides:
            raise ValueError(
                f"stem must have a level of the mask tokens' stride, {factor}, got strides {list(encoder.strides)}"
            )
        self.top = encoder.strides.index(factor)
        if options.encoder != "residual" and options.caption_dim and self.top == len(encoder.strides) - 1:
            raise ValueError(
                f"stem.caption_dim must be 0 with {options.encoder!r} at its coarsest stride, {factor}, where no unit "
                f"reads the caption, got {options.caption_dim}"
            )
        widths = [*encoder.widths]
        if options.encoder != "residual":
            # A pretrained encoder's maps are wide; the neck need not be.
            narrow = [min(width, options.widths[-1]) for width in widths]
            # Maps finer than the mask's grid are not read: weights for them would never get a gradient.
            self.lateral = nn.ModuleList(
                nn.Identity() if level < self.top else Convolution(a, b, 1)
                for level, (a, b) in enumerate(zip(widths, narrow))
            )
            widths = narrow
        else:
            self.lateral = nn.ModuleList(nn.Identity() for _ in widths)
        self.neck = nn.ModuleList(
            ResidualUnit(widths[level + 1] + widths[level], widths[level], 1, options.caption_dim, options.group_size)
            for level in range(len(widths) - 2, self.top - 1, -1)
        )
        self.features = Convolution(widths[self.top], dim, 1)
        self.draft = Convolution(widths[self.top], factor**2, 1)

    def forward(self, image: Tensor, caption: Tensor | None, image_of: Tensor | None = None) -> StemOutput:
        """Features and draft of images ``[B, C, S, S]`` in [-1, 1] and caption vectors ``[B, E]``.

        With `image_of`, int64 ``[B]``, the images are ``[U, C, S, S]`` and row b reads the one at ``image_of[b]``:
        several sentences on one image share what does not depend on the sentence. That is all of a pretrained
        encoder, and the residual one up to its first modulation by the caption.
        """
        if isinstance(self.encoder, ResidualPyramid):
            maps = self.encoder(image, caption, image_of)
        else:
            maps = [lateral(level) for lateral, level in zip(self.lateral, self.encoder(image, caption))]
            if image_of is not None:
                maps = [level[image_of] if place >= self.top else level for place, level in enumerate(maps)]
        x = maps[-1]
        for step, unit in enumerate(self.neck):
            finer = maps[len(maps) - 2 - step]
            x = unit(torch.cat([F.interpolate(x, size=finer.shape[-2:]), finer], 1), caption)
        return StemOutput(
            features=self.features(x).flatten(2).transpose(1, 2), draft=self.draft(x).flatten(2).transpose(1, 2)
        )
