"""Decoding masks and predicting files."""

from __future__ import annotations

from ntpseg.generation.generate import MaskGenerator, generate_masks
from ntpseg.generation.options import DecodingOptions, Generated
from ntpseg.generation.segmenter import Prediction, Segmenter

__all__ = ["DecodingOptions", "Generated", "MaskGenerator", "Prediction", "Segmenter", "generate_masks"]
