"""One id space for text, structure and visual codes.

Layout ``ntpseg`` (ours)::

    [0, text_size)  text        then pad, bos, boi, eoi, bom
    then image codes, then mask codes (the same ids when the codebook is shared), then eom

Layout ``emu3`` keeps the ids that Emu3's weights were trained with. There ``text_size`` counts the byte-pair ranks only
(151,643 for Emu3); 211 special ids follow, then the visual codes, which image and mask share. Emu3 closes an image with
its image-end token, which lies directly below the visual codes, so that the supervised ids stay contiguous.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from ntpseg.utils.checks import check_choice, check_integer

SequenceLayout = Literal["ntpseg", "emu3"]
SEQUENCE_LAYOUTS: tuple[SequenceLayout, ...] = ("ntpseg", "emu3")

EMU3_TEXT_SIZE = 151_643
EMU3_CODES = 32_768
# Offsets from text_size: endoftext, im_start, im_end, then extra_0 .. extra_204, then the three image tokens.
_EMU3_EXTRA = 3
_EMU3_ROW_END = _EMU3_EXTRA + 200
_EMU3_FRAME_END = _EMU3_EXTRA + 201
_EMU3_BOS = _EMU3_EXTRA + 203
_EMU3_IMAGE_TOKEN = _EMU3_EXTRA + 205
_EMU3_IMAGE_START = _EMU3_IMAGE_TOKEN + 1
_EMU3_IMAGE_END = _EMU3_IMAGE_TOKEN + 2
_EMU3_SPECIALS = _EMU3_IMAGE_TOKEN + 3
_NTPSEG_SPECIALS = 5


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a model: how many text ids and codes there are, and where each special token lies.

    Attributes:
        text_size: number of text ids, ``len(text_tokenizer)`` (byte-pair ranks alone in layout ``emu3``).
        image_codes: size of the image codebook; 0 where no image is read as tokens.
        mask_codes: size of the mask codebook; equal to `image_codes` when the codebook is shared.
        shared_codebook: image and mask codes have the same ids.
        layout: ``ntpseg`` or ``emu3``; the latter needs a shared codebook.

    Raises:
        ValueError: a size below 1 (`image_codes`: below 0), an unknown layout, or sizes that contradict a shared
            codebook.
    """

    text_size: int
    image_codes: int
    mask_codes: int
    shared_codebook: bool = False
    layout: SequenceLayout = "ntpseg"

    def __post_init__(self) -> None:
        for name, minimum in (("text_size", 1), ("image_codes", 0), ("mask_codes", 1)):
            check_integer(name, getattr(self, name), minimum)
        check_choice("layout", self.layout, SEQUENCE_LAYOUTS)
        if self.shared_codebook and self.mask_codes != self.image_codes:
            raise ValueError(
                f"mask_codes must equal image_codes, {self.image_codes}, in a shared codebook, got {self.mask_codes}"
            )
        if self.layout == "emu3" and not self.shared_codebook:
            raise ValueError("shared_codebook must be True in layout 'emu3', which has one codebook, got False")

    @classmethod
    def emu3(cls, codes: int = EMU3_CODES, text_size: int = EMU3_TEXT_SIZE) -> Vocabulary:
        """Emu3's own ids: 184,622 of them by default."""
        return cls(text_size, codes, codes, shared_codebook=True, layout="emu3")

    def _special(self, ntpseg: int, emu3: int) -> int:
        return self.text_size + (emu3 if self.layout == "emu3" else ntpseg)

    @property
    def pad(self) -> int:
        """Padding."""
        return self._special(0, 0)

    @property
    def bos(self) -> int:
        """Beginning of the sequence."""
        return self._special(1, _EMU3_BOS)

    @property
    def boi(self) -> int:
        """Beginning of the image."""
        return self._special(2, _EMU3_IMAGE_START)

    @property
    def eoi(self) -> int:
        """End of the image."""
        return self._special(3, _EMU3_IMAGE_END)

    @property
    def bom(self) -> int:
        """Beginning of the mask (Emu3's image start: to Emu3 a mask is one more image)."""
        return self._special(4, _EMU3_IMAGE_START)

    @property
    def image_range(self) -> tuple[int, int]:
        """Half-open id range of the image codes."""
        lo = self._special(_NTPSEG_SPECIALS, _EMU3_SPECIALS)
        return lo, lo + self.image_codes

    @property
    def mask_range(self) -> tuple[int, int]:
        """Half-open id range of the mask codes."""
        if self.shared_codebook:
            return self.image_range
        lo = self.image_range[1]
        return lo, lo + self.mask_codes

    @property
    def eom(self) -> int:
        """End of the mask."""
        return self.mask_range[1] if self.layout == "ntpseg" else self.text_size + _EMU3_IMAGE_END

    @property
    def supervised_range(self) -> tuple[int, int]:
        """Contiguous half-open range of all ids that can be a target: mask codes and EOM (`ntp_loss`'s vocab_range)."""
        lo, hi = self.mask_range
        return (lo, hi + 1) if self.layout == "ntpseg" else (self.eom, hi)

    @property
    def size(self) -> int:
        """Number of ids in all."""
        return self.mask_range[1] + (self.layout == "ntpseg")

    @property
    def row_end(self) -> int:
        """End of a row of codes; only layout ``emu3`` has one."""
        return self._emu3_only("row_end", _EMU3_ROW_END)

    @property
    def frame_end(self) -> int:
        """End of the last row; only layout ``emu3`` has one."""
        return self._emu3_only("frame_end", _EMU3_FRAME_END)

    @property
    def image_token(self) -> int:
        """Stands between an image's size and its first row; only layout ``emu3`` has one."""
        return self._emu3_only("image_token", _EMU3_IMAGE_TOKEN)

    def _emu3_only(self, name: str, offset: int) -> int:
        if self.layout != "emu3":
            raise ValueError(f"layout must be 'emu3' for {name}, got {self.layout!r}")
        return self.text_size + offset

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Vocabulary:
        """The inverse of `to_dict`."""
        return cls(**data)
