"""Decoding masks and predicting files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ntpseg.utils.lazy import lazy_exports

_EXPORTS = {
    "DecodingOptions": "ntpseg.generation.options",
    "Generated": "ntpseg.generation.options",
    "METHODS": "ntpseg.generation.methods",
    "MaskGenerator": "ntpseg.generation.generate",
    "Prediction": "ntpseg.generation.segmenter",
    "Segmenter": "ntpseg.generation.segmenter",
    "generate_masks": "ntpseg.generation.generate",
}

__all__ = [
    "METHODS",
    "DecodingOptions",
    "Generated",
    "MaskGenerator",
    "Prediction",
    "Segmenter",
    "generate_masks",
]

__getattr__ = lazy_exports(__name__, _EXPORTS)

if TYPE_CHECKING:
    from ntpseg.generation.generate import MaskGenerator as MaskGenerator
    from ntpseg.generation.generate import generate_masks as generate_masks
    from ntpseg.generation.methods import METHODS as METHODS
    from ntpseg.generation.options import DecodingOptions as DecodingOptions
    from ntpseg.generation.options import Generated as Generated
    from ntpseg.generation.segmenter import Prediction as Prediction
    from ntpseg.generation.segmenter import Segmenter as Segmenter
