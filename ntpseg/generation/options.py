"""How masks are decoded, and what decoding returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ntpseg.generation.methods import METHODS
from ntpseg.utils.checks import check_choice, check_integer

DECODERS = ("auto", "native", "huggingface")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class DecodingOptions:
    """Options of `generate_masks`.

    Attributes:
        batch_size: prompts decoded together; sorted by length, so that a batch wastes little.
        method: the name of one of `ntpseg.generation.methods.METHODS`. "greedy" takes one token per step; "speculative"
            lets heads 1..k-1 draft and head 0 verify, with the same result. It takes about half the steps with k = 2,
            which is faster for single images, not for batches.
        decoder: "native" is `NativeDecoder`, "huggingface" the model's own forward; "auto" is native where that is
            supported for the backbone.
        dtype: of the matrix products; "auto" is bfloat16 where the processor multiplies it natively (AMX, Ampere and
            later), else the model's own. In float32 a mask does not depend on what it was batched with, nor on
            `method`; in bfloat16 a near-tie may be decided differently (1 code in 8,000 on a trained model).

    Raises:
        ValueError: an unknown name, a batch size below 1, or a method that the Hugging Face decoder cannot run.
    """

    batch_size: int = 64
    method: str = "greedy"
    decoder: Literal["auto", "native", "huggingface"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    def __post_init__(self) -> None:
        check_integer("batch_size", self.batch_size, 1)
        check_choice("method", self.method, METHODS)
        check_choice("decoder", self.decoder, DECODERS)
        check_choice("dtype", self.dtype, DTYPES)
        if METHODS[self.method].needs_rewind and self.decoder == "huggingface":
            raise ValueError(f"decoder must be native or auto for method {self.method!r}, got 'huggingface'")


@dataclass(frozen=True)
class Generated:
    """Decoded masks of N prompts.

    Attributes:
        codes: int64 ``[N, h, w]``, indices into the mask codebook (not token ids).
        logprob: float32 ``[N, h * w]``, log-probability of each chosen code among the mask codes.
        seconds: wall time of decoding, prompts included.
        steps: forward passes after the prompt, averaged over prompts (h * w - 1 for greedy decoding).
    """

    codes: np.ndarray
    logprob: np.ndarray
    seconds: float
    steps: float

    @property
    def tokens_per_second(self) -> float:
        """Mask tokens per second of wall time, prompts' reading included."""
        return self.codes.size / self.seconds if self.seconds > 0 else 0.0

    @property
    def confidence(self) -> np.ndarray:
        """Probability of each chosen code, float32 ``[N, h, w]``."""
        return np.exp(self.logprob).reshape(self.codes.shape)


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
