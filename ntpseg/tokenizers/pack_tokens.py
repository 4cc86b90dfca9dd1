"""The tokens that ``ntpseg data pack --tokenizers`` writes beside each pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ntpseg.data.shards import TokenLayout
from ntpseg.tokenizers.auto import load_vision_tokenizer
from ntpseg.tokenizers.preprocess import parallel_map, preprocess
from ntpseg.tokenizers.text import encode_text, load_text_tokenizer, text_fingerprint
from ntpseg.tokenizers.vision import VisionTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ntpseg.data import Record

_IMAGES_PER_BATCH = 256


class PackTokenizer:
    """Tokenises pairs, each once and without augmentation.

    Args:
        vision: the vision tokenizer; it must tokenise images too.
        text: the text tokenizer.

    Attributes:
        layout: how `encode` writes.

    Raises:
        ValueError: the vision tokenizer has no codes for images.
    """

    def __init__(self, vision: VisionTokenizer, text: PreTrainedTokenizerBase) -> None:
        if not vision.image_codes:
            raise ValueError(
                "--tokenizers must have codes for images, got those of a run whose front end reads pixels; pack "
                "without them"
            )
        self.vision, self.text = vision, text
        largest = max(vision.image_codes, vision.mask_codes, len(text))
        self.layout = TokenLayout(
            dtype="<u2" if largest <= 2**16 else "<u4",
            image_grid=vision.image_grid,
            mask_grid=vision.mask_grid,
            image_size=vision.image_size,
            channels=vision.channels,
            vision=vision.fingerprint(),
            text=text_fingerprint(text),
        )

    @classmethod
    def load(cls, folder: Path) -> PackTokenizer:
        """From a run, or a folder with ``text`` and ``vision``.

        Raises:
            ValueError: there are none.
        """
        for place in (folder / "tokenizers", folder):
            if (place / "vision").is_dir() and (place / "text").is_dir():
                return cls(load_vision_tokenizer(place / "vision"), load_text_tokenizer(place / "text"))
        raise ValueError(f"--tokenizers must be a run, or a folder with text and vision in it, got {folder}")

    def encode(self, records: Sequence[Record]) -> Iterator[bytes]:
        """The tokens of each record, as `layout` says."""
        pairs = parallel_map(lambda r: preprocess(r, self.vision.image_size, self.vision.channels), records)
        while batch := list(islice(pairs, _IMAGES_PER_BATCH)):
            images = self.vision.encode_image(torch.from_numpy(np.stack([pair.image for pair in batch])))
            masks = self.vision.encode_mask(torch.from_numpy(np.stack([pair.mask for pair in batch])))
            for pair, image, mask in zip(batch, images.cpu().numpy(), masks.cpu().numpy()):
                ids = np.array(encode_text(self.text, pair.text), np.int64)
                yield np.concatenate([ids, image.ravel(), mask.ravel()]).astype(self.layout.dtype).tobytes()

    def save(self, folder: Path) -> None:
        """Write the tokenizers to ``text`` and ``vision`` in a folder."""
        self.text.save_pretrained(str(folder / "text"))
        self.vision.save_pretrained(folder / "vision")
