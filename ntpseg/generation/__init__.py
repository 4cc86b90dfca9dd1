"""Decoding masks and predicting files."""

from __future__ import annotations

from ntpseg.generation.generate import MaskGenerator, generate_masks
from ntpseg.generation.options import DecodingOptions, Generated

__all__ = ["DecodingOptions", "Generated", "MaskGenerator", "generate_masks"]
