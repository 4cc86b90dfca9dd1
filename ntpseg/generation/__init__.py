"""Decoding masks and predicting files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ntpseg.utils.lazy import lazy_exports

_EXPORTS = {
    "DecodedTokens": "ntpseg.generation.token_stream",
    "DecodingOptions": "ntpseg.generation.options",
    "Generated": "ntpseg.generation.options",
    "METHODS": "ntpseg.generation.methods",
    "MaskGenerator": "ntpseg.generation.generate",
    "PostProcessing": "ntpseg.generation.post_processing",
    "Prediction": "ntpseg.generation.options",
    "Segmenter": "ntpseg.generation.segmenter",
    "SlicePrediction": "ntpseg.generation.volume",
    "VolumePrediction": "ntpseg.generation.volume",
    "generate_masks": "ntpseg.generation.generate",
    "segment_slices": "ntpseg.generation.volume",
}

__all__ = [
    "METHODS",
    "DecodedTokens",
    "DecodingOptions",
    "Generated",
    "MaskGenerator",
    "PostProcessing",
    "Prediction",
    "Segmenter",
    "SlicePrediction",
    "VolumePrediction",
    "generate_masks",
    "segment_slices",
]

__getattr__ = lazy_exports(__name__, _EXPORTS)

if TYPE_CHECKING:
    from ntpseg.generation.generate import MaskGenerator as MaskGenerator
    from ntpseg.generation.generate import generate_masks as generate_masks
    from ntpseg.generation.methods import METHODS as METHODS
    from ntpseg.generation.options import DecodingOptions as DecodingOptions
    from ntpseg.generation.options import Generated as Generated
    from ntpseg.generation.options import Prediction as Prediction
    from ntpseg.generation.post_processing import PostProcessing as PostProcessing
    from ntpseg.generation.segmenter import Segmenter as Segmenter
    from ntpseg.generation.token_stream import DecodedTokens as DecodedTokens
    from ntpseg.generation.volume import SlicePrediction as SlicePrediction
    from ntpseg.generation.volume import VolumePrediction as VolumePrediction
    from ntpseg.generation.volume import segment_slices as segment_slices
