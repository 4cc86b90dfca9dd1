"""One branch of the compact tokenizer: patches to codes and back.

Analysis is patch-wise and orthonormal (the patches' principal axes), so a distance between latents is a distance
between pixels and a code says nothing about its neighbours. Synthesis puts the patch back by the transpose of
that rotation and adds what a small convolution sees in the neighbouring codes. Until the convolution is trained
its part is zero, and the branch is k-means on patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize

_SEARCH_ROWS = 4096


def make_quantizer(dim: int, codes: int) -> VectorQuantize:
    """A Euclidean codebook with EMA updates and dead-code restart."""
    return VectorQuantize(
        dim=dim,
        codebook_size=codes,
        decay=0.9,
        # Uses per batch below which a code is replaced. A higher bar would replace the codes of rare, telling patches.
        threshold_ema_dead_code=0.1,
        rotation_trick=False,
        # One process trains the tokenizer, also in a distributed run; by default the library would wait for the others.
        sync_codebook=False,
        sync_kmeans=False,
    )


@torch.no_grad()
def fill_quantizer(quantizer: VectorQuantize, codebook: Tensor, uses: Tensor | None = None) -> None:
    """Set the codebook, float [codes, dim], and how often a batch uses each code, [codes] (where EMA goes on from)."""
    uses = torch.ones(len(codebook), device=codebook.device) if uses is None else uses
    inner = quantizer._codebook
    inner.embed.copy_(codebook[None])
    inner.embed_avg.copy_((codebook * uses[:, None])[None])
    inner.cluster_size.copy_(uses[None])


class PatchVQ(nn.Module):
    """Codes for the patches of a square picture.

    Args:
        channels: channels of the picture.
        factor: side of a patch in pixels.
        codes: size of the codebook.
        dim: length of a latent; at most ``channels * factor**2``.
        width: channels of the synthesis convolutions.
        depth: residual 3x3 convolutions at grid resolution; each lets a patch see one patch farther.
    """

    mean: Tensor

    def __init__(self, channels: int, factor: int, codes: int, dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.factor = factor
        pixels = channels * factor**2
        self.analysis = nn.Conv2d(channels, dim, factor, stride=factor)
        self.register_buffer("mean", torch.zeros(pixels))
        self.quantizer = make_quantizer(dim, codes)
        self.base = nn.Conv2d(dim, pixels, 1)
        self.context = nn.Conv2d(dim, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.correction = nn.Conv2d(width, pixels, 1)
        nn.init.zeros_(self.correction.weight)
        assert self.correction.bias is not None
        nn.init.zeros_(self.correction.bias)

    @property
    def codebook(self) -> Tensor:
        """Float [codes, dim]."""
        return self.quantizer.codebook

    @torch.no_grad()
    def set_axes(self, axes: Tensor, mean: Tensor, gain: float, centre: float) -> None:
        """Make analysis project on orthonormal `axes` [dim, pixels] around `mean` [pixels].

        Synthesis becomes ``gain * (projected patch - centre)``: 1 and 0 give pixels back, others make logits of a mask.
        """
        self.analysis.weight.copy_(axes.view_as(self.analysis.weight))
        self.base.weight.copy_(gain * axes.T[..., None, None])
        assert self.analysis.bias is not None and self.base.bias is not None
        self.analysis.bias.copy_(-(axes @ mean))
        self.mean.copy_(mean)
        self.base.bias.copy_(gain * (mean - centre))

    def patches(self) -> Tensor:
        """Float [codes, channels * factor**2]: the patch that each code stands for, without its neighbours' part."""
        assert self.analysis.bias is not None
        axes = self.analysis.weight.flatten(1)
        # The axes are orthonormal: their transpose undoes the projection, and what it left out is the mean's own.
        return (self.codebook - self.analysis.bias) @ axes + (self.mean - axes.T @ (axes @ self.mean))

    def encode(self, x: Tensor) -> Tensor:
        """Codes, int64 [B, h, w], of float [B, channels, h * factor, w * factor]."""
        latent = self.analysis(x).permute(0, 2, 3, 1)
        book = self.codebook
        offset = -0.5 * book.square().sum(1)
        # The quantizer's own search makes several [rows, codes] tables (distance, root, one-hot); one, kept small
        # enough for the cache, gives the same codes at 2 to 4 times the speed.
        rows = latent.flatten(0, 2).split(_SEARCH_ROWS)
        return torch.cat([torch.addmm(offset, part, book.T).argmax(1) for part in rows]).view(latent.shape[:3])

    def decode(self, codes: Tensor) -> Tensor:
        """Float [B, channels, h * factor, w * factor] of codes, int64 [B, h, w]; logits for a mask."""
        latent = F.embedding(codes, self.codebook).permute(0, 3, 1, 2)
        hidden = self.context(latent)
        for block in self.blocks:
            hidden = hidden + block(F.gelu(hidden))
        return F.pixel_shuffle(self.base(latent) + self.correction(F.gelu(hidden)), self.factor)
