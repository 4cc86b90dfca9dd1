"""How masks are decoded, and what decoding returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ntpseg.generation.methods import METHODS
from ntpseg.generation.uncertainty import pairwise_dice, pixel_entropy
from ntpseg.utils.checks import brief, check_bool, check_choice, check_integer, check_number

if TYPE_CHECKING:
    from ntpseg.models.bundle import Bundle

DECODERS = ("auto", "native", "huggingface")
READOUTS = ("auto", "codes", "expected")
DTYPES = ("auto", "float32", "bfloat16", "float16")


class NonFiniteOutput(ValueError):
    """A model's output is NaN, from which no mask can be read."""


@dataclass(frozen=True)
class DecodingOptions:
    """Options of `generate_masks`.

    Attributes:
        batch_size: prompts decoded together; sorted by length, so that a batch wastes little.
        method: the name of one of `ntpseg.generation.methods.METHODS`. "greedy" takes one token per step; "speculative"
            lets heads 1..k-1 draft and head 0 verify, with the same result. It takes about half the steps with k = 2,
            which is faster for single images, not for batches. "jacobi" drafts and verifies whole masks, with the same
            result in a few steps where the model drafts well. "expected" feeds back the code nearest to the expected
            patch, "refine" decodes all cells at once, "sample" averages sampled masks.
        passes: of method "refine": how often the last draft is read; 0 feeds nothing back.
        samples: of method "sample": how many masks are drawn of each prompt. They are decoded together as far as
            `batch_size` rows hold them, and sample i is the same whatever their number and whatever else is in a batch.
        temperature, top_p: of method "sample": of the distribution over codes, see
            `ntpseg.generation.sampling.tempered`.
        seed: of method "sample".
        readout: "codes" decodes the mask from its codes ("sample": the mean of each sample's), "expected" from the
            expected patches; "auto" is "codes" for "greedy", "speculative" and "jacobi", as in the paper, and
            "expected" for the other methods ("sample": where the model has a read-out).
        threshold: foreground probability, before its calibration, from which a pixel is foreground.
        calibration_temperature: divides the logit of every pixel's probability, see
            `ntpseg.generation.calibration.calibrate`. It changes probabilities and never a mask: the threshold is
            applied before it.
        mirror: also decode the mirrored image with left and right exchanged in the sentence, and average; takes twice
            the time. For data in which a mirrored image is anatomically right.
        decoder: "native" is `NativeDecoder`, "huggingface" the model's own forward; "auto" is native where that is
            supported for the backbone.
        dtype: of the matrix products; "auto" is bfloat16 where the processor multiplies it natively (AMX, Ampere and
            later), else the model's own. In float32 a mask does not depend on what it was batched with, nor on
            `method`; in bfloat16 a near-tie may be decided differently (1 code in 8,000 on a trained model).

    Raises:
        ValueError: an unknown name, a number that is none or out of range, or a method that the Hugging Face decoder
            cannot run.
    """

    batch_size: int = 64
    method: str = "greedy"
    passes: int = 1
    samples: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    readout: Literal["auto", "codes", "expected"] = "auto"
    threshold: float = 0.5
    calibration_temperature: float = 1.0
    mirror: bool = False
    decoder: Literal["auto", "native", "huggingface"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    @classmethod
    def of_bundle(cls, bundle: Bundle, **changes: Any) -> DecodingOptions:
        """How a bundle's model decodes, with changes.

        The saved choice suits the saved method: with another method the other fields have their defaults.

        Args:
            bundle: the model; its ``decoding`` is the saved choice.
            **changes: fields of this class; None leaves one as it is.

        Raises:
            ValueError: a change that the method does not read, or see the class.
        """
        saved = dict(bundle.decoding or {})
        given = {name: value for name, value in changes.items() if value is not None}
        if given.get("method", saved.get("method")) != saved.get("method"):
            saved = {}
        options = cls(**{**saved, **given})
        check_read(options.method, given)
        return options

    @property
    def expected_readout(self) -> bool:
        """Whether masks are read out as expected patches."""
        if self.readout == "auto":
            return METHODS[self.method].needs_readout or METHODS[self.method].reads_expected
        return self.readout == "expected"

    def __post_init__(self) -> None:
        check_integer("batch_size", self.batch_size, 1)
        check_choice("method", self.method, METHODS)
        check_integer("passes", self.passes, 0)
        check_integer("samples", self.samples, 1)
        check_integer("seed", self.seed, 0)
        check_number("temperature", self.temperature, above=0)
        check_number("top_p", self.top_p, maximum=1, above=0)
        check_number("calibration_temperature", self.calibration_temperature, above=0)
        check_bool("mirror", self.mirror)
        check_number("threshold", self.threshold, above=0, below=1)
        check_choice("readout", self.readout, READOUTS)
        check_choice("decoder", self.decoder, DECODERS)
        check_choice("dtype", self.dtype, DTYPES)
        if METHODS[self.method].needs_rewind and self.decoder == "huggingface":
            raise ValueError(f"decoder must be native or auto for method {self.method!r}, got 'huggingface'")


def check_read(method: str, given: Mapping[str, Any]) -> None:
    """Refuse options of another method than the one that decodes.

    Args:
        method: a name of `METHODS`.
        given: fields of `DecodingOptions` that were asked for; those saved with a model are none.

    Raises:
        ValueError: one of them would change nothing.
    """
    for other in METHODS.values():
        for name in other.options:
            if other.name != method and given.get(name) is not None:
                raise ValueError(
                    f"{name} must be given with method {other.name!r}, which alone reads it, got {brief(given[name])} "
                    f"with {method!r}; leave it out, or choose that method"
                )


@dataclass(frozen=True)
class Generated:
    """Decoded masks of N prompts.

    Attributes:
        codes: int64 ``[N, h, w]``, indices into the mask codebook (not token ids).
        logprob: float32 ``[N, h * w]``, log-probability of each chosen code among the mask codes.
        seconds: wall time of decoding, prompts included.
        steps: forward passes after the prompt, averaged over prompts (h * w - 1 for greedy decoding).
        probability: float32 ``[N, S, S]``, foreground probability of every pixel at the model's size by the expected
            patches, not calibrated; None with the read-out "codes" or without a read-out.
        samples: int64 ``[N, n, h, w]``, the codes of every sample of method "sample"; None of other methods.
    """

    codes: np.ndarray
    logprob: np.ndarray
    seconds: float
    steps: float
    probability: np.ndarray | None = None
    samples: np.ndarray | None = None

    @property
    def tokens_per_second(self) -> float:
        """Mask tokens per second of wall time, prompts' reading included."""
        return self.codes.size / self.seconds if self.seconds > 0 else 0.0

    @property
    def confidence(self) -> np.ndarray:
        """Probability of each chosen code, float32 ``[N, h, w]``."""
        return np.exp(self.logprob).reshape(self.codes.shape)


@dataclass(frozen=True)
class Prediction:
    """One segmented image.

    Attributes:
        mask: bool ``[H, W]``, the image's own size.
        confidence: float32 ``[h, w]``, the probability of each patch's code among all mask codes.
        codes: int64 ``[h, w]``, the mask codes.
        probability: float32 ``[S, S]``, the foreground probability of every pixel at the model's size, calibrated where
            the model has a `calibration_temperature`.
        samples: float32 ``[n, S, S]``, the foreground of every sampled mask alone (method "sample", with ``mirror`` of
            the image itself); None of other methods.
    """

    mask: np.ndarray
    confidence: np.ndarray
    codes: np.ndarray
    probability: np.ndarray
    samples: np.ndarray | None = None

    @property
    def entropy(self) -> np.ndarray:
        """Entropy of `probability` in bits, float32 ``[S, S]``; see `ntpseg.generation.uncertainty.pixel_entropy`."""
        return pixel_entropy(self.probability)

    @property
    def deviation(self) -> np.ndarray | None:
        """Standard deviation between the samples, float32 ``[S, S]``; None with fewer than two."""
        return None if self.samples is None or len(self.samples) < 2 else self.samples.std(0, ddof=1)

    @property
    def sample_dice(self) -> float | None:
        """Mean Dice between pairs of samples, each cut at 0.5; None with fewer than two."""
        return None if self.samples is None or len(self.samples) < 2 else pairwise_dice(self.samples >= 0.5)


def resolve_dtype(name: str, model: Any) -> torch.dtype:
    """The dtype that `DecodingOptions.dtype` means for a model on its device."""
    if name != "auto":
        return getattr(torch, name)
    parameter: Tensor = next(model.parameters())
    if parameter.dtype != torch.float32:
        return parameter.dtype
    if parameter.is_cuda:
        native = torch.cuda.get_device_capability(parameter.device) >= (8, 0)
    else:
        # Private until PyTorch offers a public query; without it bfloat16 is emulated and slower than float32.
        native = parameter.device.type == "cpu" and getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    return torch.bfloat16 if native else parameter.dtype
