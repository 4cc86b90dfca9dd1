"""The jobs of the server: one slice with its tokens, or a whole volume."""

from __future__ import annotations

import base64
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from ntpseg.data import resize_probability
from ntpseg.generation import METHODS, DecodedTokens, Segmenter, segment_slices
from ntpseg.serving.decoding_queue import Event, Job
from ntpseg.serving.images import StoredImage, StoredMask
from ntpseg.serving.store import ImageStore
from ntpseg.volumes import Axis
from ntpseg.volumes.volume import display

if TYPE_CHECKING:
    from ntpseg.generation import Prediction


class Decodes:
    """What the server's jobs share.

    Args:
        segmenter: the model.
        store: where masks are kept.
    """

    def __init__(self, segmenter: Segmenter, store: ImageStore) -> None:
        self.segmenter, self.store = segmenter, store
        # The patch of each code alone, where what is written is the code and not an expected patch.
        self._code_patches: np.ndarray | None = None

    def describe(self) -> dict[str, Any]:
        """How masks come: the grid of tokens and whether they are decoded one after the other."""
        options = self.segmenter.options
        return {
            "grid": list(self.segmenter.bundle.sequence.mask_grid),
            "method": options.method,
            "streams": METHODS[options.method].streams,
            "passes": options.passes + 1 if options.method == "refine" else None,
            "samples": options.samples if options.method == "sample" else None,
            "threshold": options.threshold,
            "mirror": options.mirror,
        }

    def slice(self, image: StoredImage, text: str, axis: Axis, index: int, window: str, job: Job) -> Event:
        """Segment one slice, or a picture; its tokens are events."""
        started = time.perf_counter()
        pixels = image.pixels(axis, index, window)
        job.emit({"event": "start", **self.describe()})
        prediction = self.segmenter.segment(pixels, text, lambda tokens: job.emit(self._tokens(tokens)))
        mask = StoredMask(text, *_stored(prediction), axis, index)
        place = next(known for known in image.axes() if known["axis"] == axis)
        area = int(mask.mask.sum())
        spacing = place["spacing"]
        return {
            "mask": self.store.add_mask(image, mask),
            "text": text,
            "axis": axis,
            "index": index,
            "pixels": area,
            "percent": 100 * area / mask.mask.size,
            "mm2": None if spacing is None else area * spacing[0] * spacing[1],
            "confidence": float(prediction.confidence.mean()),
            "seconds": time.perf_counter() - started,
        }

    def whole(self, image: StoredImage, text: str, axis: Axis, window: str, job: Job) -> Event:
        """Segment every slice of a volume along `axis`; each is an event."""
        from ntpseg.generation.volume import voxel_ml

        started = time.perf_counter()
        volume = image.volume
        assert volume is not None
        mask = np.zeros(volume.geometry.shape, bool)
        probability = np.zeros(volume.geometry.shape, np.uint8)
        count, confidence, areas = volume.count(axis), [], []
        job.emit({"event": "start", "count": count, **self.describe()})
        for found in segment_slices(self.segmenter, volume, [text], axis=axis, window=window):
            own, soft = _stored(found.predictions[0])
            display(mask, found.index, axis)[...], display(probability, found.index, axis)[...] = own, soft
            confidence.append(float(found.predictions[0].confidence.mean()))
            areas.append(int(own.sum()))
            job.emit({"event": "slice", "index": found.index, "done": len(areas), "count": count, "pixels": areas[-1]})
        voxels = int(mask.sum())
        ml = voxels * voxel_ml(volume.geometry) if volume.header.spacing_known else None
        return {
            "mask": self.store.add_mask(image, StoredMask(text, mask, probability)),
            "text": text,
            "axis": axis,
            "index": None,
            "voxels": voxels,
            "percent": 100 * voxels / mask.size,
            "ml": ml,
            "slices": areas,
            "confidence": float(np.mean(confidence)),
            "seconds": time.perf_counter() - started,
        }

    def _tokens(self, tokens: DecodedTokens) -> Event:
        patches = tokens.patches if self.segmenter.options.expected_readout else None
        if patches is None:
            if self._code_patches is None:
                self._code_patches = self.segmenter.bundle.vision.mask_patches().flatten(1).float().cpu().numpy()
            patches = self._code_patches[tokens.codes]
        return {
            "event": "tokens",
            "first": tokens.first,
            "codes": tokens.codes.tolist(),
            "confidence": [round(float(value), 4) for value in np.exp(tokens.logprob)],
            "patches": base64.b64encode(eight_bits(patches).tobytes()).decode(),
        }


def _stored(prediction: Prediction) -> tuple[np.ndarray, np.ndarray]:
    """Mask and probability at the image's own size."""
    height, width = prediction.mask.shape
    return prediction.mask, eight_bits(resize_probability(prediction.probability, height, width))


def eight_bits(probability: np.ndarray) -> np.ndarray:
    """Probabilities as uint8; 255 is 1."""
    return np.rint(np.clip(probability, 0, 1) * 255).astype(np.uint8)
