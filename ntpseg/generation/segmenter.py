"""`Segmenter`: an image and a sentence in, a mask at the image's own size out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch

from ntpseg.data import prepare, read_image, resize_mask, swap_laterality
from ntpseg.generation.calibration import calibrate
from ntpseg.generation.generate import MaskGenerator
from ntpseg.generation.options import DecodingOptions, Generated, Prediction, check_read
from ntpseg.generation.token_stream import TokenListener
from ntpseg.tokenizers.text import encode_text

if TYPE_CHECKING:
    from ntpseg.generation.post_processing import PostProcessing
    from ntpseg.generation.volume import VolumePrediction
    from ntpseg.models.bundle import Bundle
    from ntpseg.volumes import Axis, Volume

ENCODE_BATCH = 32


@dataclass(frozen=True)
class EncodedImages:
    """N images as a model reads them.

    Attributes:
        codes: int64 ``[N, h, w]``, the image tokens; None where the model reads none.
        pixels: float32 ``[N, C, S, S]`` in [-1, 1]; None where the model has no stem.
        mirrored: the same images mirrored, where the options ask for it.
    """

    codes: np.ndarray | None
    pixels: np.ndarray | None
    mirrored: EncodedImages | None = None

    def __len__(self) -> int:
        return len(self.pixels if self.codes is None else self.codes)  # type: ignore[arg-type]

    def take(self, chosen: Sequence[int]) -> EncodedImages:
        """The images at these indices."""
        index = np.asarray(chosen, dtype=np.int64)
        return EncodedImages(
            None if self.codes is None else self.codes[index],
            None if self.pixels is None else self.pixels[index],
            None if self.mirrored is None else self.mirrored.take(chosen),
        )


class Segmenter:
    """Segments images with a trained model.

    Args:
        bundle: model, tokenizers and sequence format, see `ntpseg.models.Bundle`.
        options: see `DecodingOptions`; those that were saved with the model by default.
    """

    def __init__(self, bundle: Bundle, options: DecodingOptions | None = None) -> None:
        self.bundle = bundle
        self.options = options or DecodingOptions.of_bundle(bundle)
        self.generator = MaskGenerator(bundle.model, bundle.sequence, self.options)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | PathLike[str],
        options: DecodingOptions | None = None,
        *,
        device: str | torch.device | None = None,
        **changes: Any,
    ) -> Segmenter:
        """Load a model.

        Args:
            directory: a run or its ``model/`` directory.
            options: how masks are decoded; by default as was saved with the model.
            device: the GPU if there is one, by default.
            **changes: fields of `DecodingOptions` that replace the saved ones, see `DecodingOptions.of_bundle`.

        Raises:
            ValueError: no model there or a damaged one, a device that is not here, both `options` and `changes`, or
                options that the model does not allow.
        """
        from ntpseg.models.bundle import Bundle
        from ntpseg.models.damage import damaged_file
        from ntpseg.utils.device import usable_device

        if options is not None and changes:
            raise ValueError(f"options must be None with changes of the saved ones, got both: {sorted(changes)}")
        # Unknown names and values out of range are told before a large model is loaded.
        DecodingOptions(**{name: value for name, value in changes.items() if value is not None})
        if changes.get("method") is not None:
            check_read(changes["method"], changes)
        device = usable_device(device)
        try:
            bundle = Bundle.from_pretrained(Path(directory), device=device)
        except Exception as error:  # broken files raise errors of zlib, json, safetensors, tokenizers, torch ...
            reason = damaged_file(Path(directory)) or " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"model must be a whole run of `ntpseg train` or file of `ntpseg pack`, got {str(directory)!r}, which "
                f"cannot be loaded ({reason}); copy it again, or train or pack it again"
            ) from error
        return cls(bundle, options or DecodingOptions.of_bundle(bundle, **changes))

    @overload
    def segment(  # type: ignore[overload-overlap]  # a str is a sequence of str too; it comes first
        self, image: np.ndarray | str | PathLike[str], text: str, listener: TokenListener | None = None
    ) -> Prediction: ...

    @overload
    def segment(
        self, image: np.ndarray | str | PathLike[str], text: Sequence[str], listener: TokenListener | None = None
    ) -> list[Prediction]: ...

    def segment(
        self,
        image: np.ndarray | str | PathLike[str],
        text: str | Sequence[str],
        listener: TokenListener | None = None,
    ) -> Prediction | list[Prediction]:
        """Segment what `text` refers to.

        Args:
            image: a file, or pixels uint8 ``[H, W]`` or ``[H, W, 3]``.
            text: the sentence, which may be empty, or several: they are decoded together, the image is encoded once.
            listener: called with the mask's tokens as they are decoded, see `MaskGenerator`.

        Raises:
            ValueError: there is no sentence, or the image cannot be read or is not uint8.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("text must be a sentence or several, got none")
        predictions = list(self.segment_all([image] * len(texts), texts, listener=listener))
        return predictions[0] if isinstance(text, str) else predictions

    def segment_all(
        self,
        images: Sequence[np.ndarray | str | PathLike[str]],
        texts: Sequence[str],
        progress: Callable[[int], None] | None = None,
        listener: TokenListener | None = None,
    ) -> Iterator[Prediction]:
        """Segment pair after pair of an image and its sentence; decoded together, yielded in order.

        A `listener` is called with their tokens, see `MaskGenerator`; with ``mirror`` with those of the image itself.

        Raises:
            ValueError: there are not as many texts as images, or an image cannot be read.
        """
        if len(images) != len(texts):
            raise ValueError(f"texts must have the length of images, {len(images)}, got {len(texts)}")
        # An image is read and encoded once, however many sentences are about it. All are held, or those that a sequence
        # makes on access would have one address.
        images = list(images)
        order: dict[int | str, int] = {}
        keys = [id(image) if isinstance(image, np.ndarray) else str(image) for image in images]
        places = [order.setdefault(key, len(order)) for key in keys]
        different = [images[places.index(place)] for place in range(len(order))]
        sizes: list[tuple[int, int]] = []
        encoded = self.encode(self._pixels(different, sizes))
        if len(different) < len(images):
            encoded = encoded.take(places)
        generated = self.decode(encoded, texts, progress, listener)
        for i, probability in enumerate(self.probabilities(generated)):
            mask = resize_mask(probability, *sizes[places[i]], threshold=self.options.threshold)
            yield self.prediction(generated, i, probability, mask)

    @overload
    def segment_volume(  # type: ignore[overload-overlap]  # a str is a sequence of str too; it comes first
        self,
        volume: Volume | str | PathLike[str],
        text: str,
        *,
        axis: Axis | None = None,
        window: str | None = None,
        series: str | None = None,
        post_processing: PostProcessing | None = None,
        probability: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> VolumePrediction: ...

    @overload
    def segment_volume(
        self,
        volume: Volume | str | PathLike[str],
        text: Sequence[str],
        *,
        axis: Axis | None = None,
        window: str | None = None,
        series: str | None = None,
        post_processing: PostProcessing | None = None,
        probability: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> list[VolumePrediction]: ...

    def segment_volume(
        self, volume: Volume | str | PathLike[str], text: str | Sequence[str], **options: Any
    ) -> VolumePrediction | list[VolumePrediction]:
        """Segment what a sentence refers to in every slice of a volume.

        Slices are rendered, encoded and decoded in groups of ``batch_size // sentences``; several sentences share the
        encoded slices. Held are the volume, one byte per voxel and sentence for the masks (two more with
        `probability`, four for a moment with `post_processing`), and one group; `segment_slices` holds no masks.

        Args:
            volume: a `Volume`, or a path for `read_volume`: a DICOM file or folder, NIfTI, NRRD or MetaImage.
            text: the sentence, or several.
            axis: "axial", "coronal" or "sagittal", along which the volume is cut; by default that of the model's
                training data.
            window: how voxels become grey levels or the three channels, see `ntpseg.volumes.windows.parse_window`; by
                default that of the model's training data.
            series: which series of a DICOM folder, see `read_volume`.
            post_processing: see `PostProcessing`; none by default.
            probability: also give each voxel's probability.
            progress: called with the number of masks of slices just finished; ``volume.count(axis)`` for each
                sentence in all.

        Returns:
            A `VolumePrediction`; for several sentences a list of them, in their order.

        Raises:
            ValueError: the volume cannot be read, a sentence says nothing, or the model remembers no axis or window of
                its training data and none is given.
        """
        from ntpseg.generation.volume import segment_volume

        if isinstance(text, str):
            return segment_volume(self, volume, [text], **options)[0]
        return segment_volume(self, volume, text, **options)

    def encode(self, images: Iterable[np.ndarray]) -> EncodedImages:
        """What the model reads of images, uint8 ``[H, W]`` or ``[H, W, 3]`` of any size."""
        vision = self.bundle.vision
        has_codes = self.bundle.sequence.image_grid is not None
        has_pixels = self.bundle.model.front_end is not None
        codes: dict[bool, list[np.ndarray]] = {False: [], True: []}
        pixels: list[np.ndarray] = []
        batch: list[np.ndarray] = []

        def flush() -> None:
            stacked = np.stack(batch)
            batch.clear()
            if has_pixels:
                pixels.append(stacked)
            if has_codes:
                codes[False].append(self.image_codes(stacked))
                if self.options.mirror:
                    codes[True].append(self.image_codes(stacked[..., ::-1]))

        with torch.inference_mode():
            for image in images:
                batch.append(prepare(image, None, vision.image_size, vision.channels)[0])
                if len(batch) == ENCODE_BATCH:
                    flush()
            if batch:
                flush()
        own = np.concatenate(pixels) if has_pixels else None
        mirrored = None
        if self.options.mirror:
            turned = None if own is None else np.ascontiguousarray(own[..., ::-1])
            mirrored = EncodedImages(np.concatenate(codes[True]) if has_codes else None, turned)
        return EncodedImages(np.concatenate(codes[False]) if has_codes else None, own, mirrored)

    def encode_prepared(self, pixels: np.ndarray) -> EncodedImages:
        """What `encode` gives, of images that `ntpseg.data.prepare` made, float32 ``[N, C, S, S]``."""
        own = self._encoded(pixels)
        turned = self._encoded(np.ascontiguousarray(pixels[..., ::-1])) if self.options.mirror else None
        return EncodedImages(own.codes, own.pixels, turned)

    def _encoded(self, pixels: np.ndarray) -> EncodedImages:
        with torch.inference_mode():
            codes = None if self.bundle.sequence.image_grid is None else self.image_codes(pixels)
        return EncodedImages(codes, None if self.bundle.model.front_end is None else pixels)

    def image_codes(self, pixels: np.ndarray) -> np.ndarray:
        """The image tokens, int64 ``[N, h, w]``, of prepared images float32 ``[N, C, S, S]``."""
        vision, grid = self.bundle.vision, self.bundle.sequence.image_grid
        if self.bundle.model.config.front_end == "features":
            # Features that are not aligned stand on one code.
            return np.zeros((len(pixels), *(grid or ())), np.int64)
        return vision.encode_image(torch.from_numpy(np.ascontiguousarray(pixels))).cpu().numpy()

    def decode(
        self,
        images: EncodedImages,
        texts: Sequence[str],
        progress: Callable[[int], None] | None = None,
        listener: TokenListener | None = None,
    ) -> Generated:
        """Masks of N images and N sentences.

        With ``mirror`` the probabilities are the mean of the image's and its mirror image's, and codes, confidence and
        steps are the image's own.
        """
        generated = self._generate(images, texts, progress, listener)
        if images.mirrored is None:
            return generated
        turned = self._generate(images.mirrored, [swap_laterality(text) for text in texts])
        both = (np.stack(list(self.probabilities(generated))), np.stack(list(self.probabilities(turned)))[..., ::-1])
        return replace(generated, probability=(both[0] + both[1]) / 2, seconds=generated.seconds + turned.seconds)

    def _generate(
        self,
        images: EncodedImages,
        texts: Sequence[str],
        progress: Callable[[int], None] | None = None,
        listener: TokenListener | None = None,
    ) -> Generated:
        ids = {text: encode_text(self.bundle.text, text) for text in dict.fromkeys(texts)}
        codes = [None] * len(images) if images.codes is None else images.codes
        prompts = [self.bundle.sequence.prompt(ids[text], code) for text, code in zip(texts, codes, strict=True)]
        return self.generator(prompts, progress, images.pixels, listener)

    def probabilities(self, generated: Generated) -> Iterator[np.ndarray]:
        """The foreground probability, float32 ``[S, S]`` at the model's size, of each decoded mask; not calibrated."""
        if generated.probability is not None:
            yield from generated.probability
        elif generated.samples is not None:
            for codes in generated.samples:
                yield np.mean(list(self.decode_codes(codes)), axis=0)
        else:
            yield from self.decode_codes(generated.codes)

    def prediction(self, generated: Generated, index: int, probability: np.ndarray, mask: np.ndarray) -> Prediction:
        """What is returned of one decoded mask.

        Args:
            generated: what `decode` gave.
            index: which of its masks.
            probability: of `probabilities`, float32 ``[S, S]``.
            mask: cut out of it, bool ``[H, W]``.
        """
        samples = None if generated.samples is None else np.stack(list(self.decode_codes(generated.samples[index])))
        calibrated = calibrate(probability, self.options.calibration_temperature)
        return Prediction(mask, generated.confidence[index], generated.codes[index], calibrated, samples)

    def decode_codes(self, mask_codes: np.ndarray) -> Iterator[np.ndarray]:
        """The foreground probability, float32 ``[S, S]`` at the model's size, of each of ``[N, h, w]`` mask codes."""
        for first in range(0, len(mask_codes), ENCODE_BATCH):
            part = torch.from_numpy(np.ascontiguousarray(mask_codes[first : first + ENCODE_BATCH]))
            # Closed before anything is yielded: a generator suspended inside it would leave the caller without
            # gradients, permanently where two of them alternate.
            with torch.inference_mode():
                decoded = self.bundle.vision.decode_mask(part)[:, 0].float().cpu().numpy()
            yield from decoded

    @staticmethod
    def _pixels(
        images: Sequence[np.ndarray | str | PathLike[str]], sizes: list[tuple[int, int]]
    ) -> Iterator[np.ndarray]:
        for image in images:
            pixels = image if isinstance(image, np.ndarray) else read_image(image)
            sizes.append((pixels.shape[0], pixels.shape[1]))
            yield pixels
