"""What a vision tokenizer preserves of an image and a mask: mask Dice ceiling, image PSNR, use of the codebooks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ntpseg.data.records import check_masks
from ntpseg.tokenizers.preprocess import parallel_map, preprocess
from ntpseg.tokenizers.vision import VisionTokenizer
from ntpseg.utils.progress import progress_bar

if TYPE_CHECKING:
    from ntpseg.data import Record

_BATCH = 64
# The peak signal of images in [-1, 1] is 2. A perfect reconstruction has no finite PSNR: it counts as 16-bit rounding.
_PEAK = 2.0
_MIN_ERROR = (_PEAK / 2**16) ** 2


@dataclass(frozen=True)
class Reconstruction:
    """One record at the tokenizer's size, and what became of it.

    Attributes:
        case, text: of the record.
        image, decoded_image: float32 [C, S, S] in [-1, 1].
        mask, decoded_mask: float32 [1, S, S]; the decoded one holds probabilities.
        image_codes, mask_codes: int64 [h, w].
        dice: of the mask at the image's own size.
        dice_resized: of the mask at the tokenizer's size.
        overlap, area: pixels in both masks, and the sum of both areas, at the image's own size.
        psnr: of the image at the tokenizer's size, dB.
    """

    case: str
    text: str
    image: np.ndarray = field(repr=False)
    decoded_image: np.ndarray = field(repr=False)
    mask: np.ndarray = field(repr=False)
    decoded_mask: np.ndarray = field(repr=False)
    image_codes: np.ndarray = field(repr=False)
    mask_codes: np.ndarray = field(repr=False)
    dice: float
    dice_resized: float
    overlap: int
    area: int
    psnr: float


@dataclass(frozen=True)
class TokenizerQuality:
    """Reconstructions of N records.

    Attributes:
        dice: float64 [N], mask Dice at the image's own size, resizing included: what a model scores that predicts
            every mask token right.
        dice_resized: float64 [N], mask Dice at the tokenizer's size: what the codes alone lose.
        pooled: Dice over all pixels of all records, at their own sizes.
        psnr: float64 [N], dB, of the image at the tokenizer's size.
        image_usage, mask_usage: int64 [codes], how often each code occurred.
        examples: the reconstructions that were to be kept.
    """

    dice: np.ndarray
    dice_resized: np.ndarray
    pooled: float
    psnr: np.ndarray
    image_usage: np.ndarray
    mask_usage: np.ndarray
    examples: list[Reconstruction] = field(repr=False)

    def summary(self) -> dict[str, Any]:
        """Means and counts, ready for JSON."""
        return {
            "cases": len(self.dice),
            "dice_ceiling": float(self.dice.mean()),
            "dice_ceiling_pooled": self.pooled,
            "dice_ceiling_5_percent": float(np.quantile(self.dice, 0.05)),
            "dice_ceiling_at_tokenizer_size": float(self.dice_resized.mean()),
            "image_psnr_db": float(self.psnr.mean()),
            "image_codes_used": int((self.image_usage > 0).sum()),
            "mask_codes_used": int((self.mask_usage > 0).sum()),
            "image_perplexity": perplexity(self.image_usage),
            "mask_perplexity": perplexity(self.mask_usage),
        }


def perplexity(usage: np.ndarray) -> float:
    """``exp(entropy)`` of counts [codes]: the number of codes that evenly used ones would be."""
    probability = usage[usage > 0] / usage.sum()
    return float(np.exp(-(probability * np.log(probability)).sum()))


def measure(
    vision: VisionTokenizer, records: Sequence[Record], *, examples: int = 12, worst: int = 4, progress: bool = True
) -> TokenizerQuality:
    """Encode and decode every record.

    Args:
        vision: the tokenizer.
        records: each with a mask.
        examples: reconstructions to keep, evenly over the records.
        worst: reconstructions of the lowest Dice to keep besides.
        progress: show a progress bar.

    Raises:
        ValueError: no record, a record without mask, or an unreadable file.
    """
    check_masks(records)
    even = set(np.linspace(0, len(records) - 1, min(examples, len(records))).round().astype(int).tolist())
    even_examples: list[Reconstruction] = []
    lowest: list[tuple[float, int, Reconstruction]] = []
    numbers: list[tuple[float, float, float, int, int]] = []
    usage = [np.zeros(n, np.int64) for n in (vision.image_codes, vision.mask_codes)]
    with progress_bar("reconstructions", len(records), enabled=progress) as advance:
        for index, result in enumerate(_reconstruct(vision, records)):
            numbers.append((result.dice, result.dice_resized, result.psnr, result.overlap, result.area))
            for counts, codes in zip(usage, (result.image_codes, result.mask_codes), strict=True):
                counts += np.bincount(codes.ravel(), minlength=len(counts))
            if index in even:
                even_examples.append(result)
            else:
                lowest = sorted([*lowest, (result.dice, index, result)], key=lambda entry: entry[:2])[:worst]
            advance(1)
    dice, resized, psnr, overlap, area = (np.array(column) for column in zip(*numbers, strict=True))
    return TokenizerQuality(
        dice=dice,
        dice_resized=resized,
        pooled=_dice(int(overlap.sum()), int(area.sum())),
        psnr=psnr,
        image_usage=usage[0],
        mask_usage=usage[1],
        examples=even_examples + [result for *_, result in lowest],
    )


def _reconstruct(vision: VisionTokenizer, records: Sequence[Record]) -> Iterator[Reconstruction]:
    from ntpseg.data import read_truth, resize_mask

    def load(record: Record) -> tuple[Record, np.ndarray, np.ndarray, np.ndarray]:
        assert record.mask is not None
        image, mask, _ = preprocess(record, vision.image_size, vision.channels)
        return record, image, mask, read_truth(record)

    loaded = parallel_map(load, records, prefetch=2 * _BATCH)
    while batch := list(itertools.islice(loaded, _BATCH)):
        images = torch.from_numpy(np.stack([image for _, image, _, _ in batch]))
        masks = torch.from_numpy(np.stack([mask for _, _, mask, _ in batch]))
        codes = vision.encode_image(images), vision.encode_mask(masks)
        decoded = vision.decode_image(codes[0]), vision.decode_mask(codes[1])
        arrays = (t.cpu().numpy() for t in (*codes, *decoded))
        for (record, image, mask, truth), *row in zip(batch, *arrays, strict=True):
            image_codes, mask_codes, decoded_image, decoded_mask = row
            predicted = resize_mask(decoded_mask[0], *truth.shape)
            small, small_truth = decoded_mask > 0.5, mask > 0.5
            overlap, area = int((predicted & truth).sum()), int(predicted.sum() + truth.sum())
            error = max(float(np.square(decoded_image - image).mean()), _MIN_ERROR)
            yield Reconstruction(
                case=record.case,
                text=record.text,
                image=image,
                decoded_image=decoded_image,
                mask=mask,
                decoded_mask=decoded_mask,
                image_codes=image_codes,
                mask_codes=mask_codes,
                dice=_dice(overlap, area),
                dice_resized=_dice(int((small & small_truth).sum()), int(small.sum() + small_truth.sum())),
                overlap=overlap,
                area=area,
                psnr=10 * float(np.log10(_PEAK**2 / error)),
            )


def _dice(overlap: int, area: int) -> float:
    return 2 * overlap / area if area else 1.0
