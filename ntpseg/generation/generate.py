"""Masks from prompts: batching by length, the choice of decoder, timing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntpseg.generation.greedy import greedy
from ntpseg.generation.huggingface import HuggingFaceDecoder
from ntpseg.generation.native import NativeDecoder, unsupported
from ntpseg.generation.options import DecodingOptions, Generated, resolve_dtype
from ntpseg.generation.speculative import speculative
from ntpseg.generation.target import Target


class MaskGenerator:
    """A model made ready for decoding; keep it while the weights do not change.

    Args:
        model: an `NTPSegModel`, in either mode; it decodes in eval mode and is left as it was.
        sequence: its `SequenceFormat`.
        options: see `DecodingOptions`.

    Raises:
        ValueError: the options ask for the native path or for speculation, and the model does not allow it.
    """

    def __init__(self, model: Any, sequence: Any, options: DecodingOptions | None = None) -> None:
        self.model, self.sequence, self.options = model, sequence, options or DecodingOptions()
        self.device = next(model.parameters()).device
        self.target = Target(sequence, self.device)
        dtype = resolve_dtype(self.options.dtype, model)
        reason = unsupported(model.backbone)
        chosen = self.options.decoder
        wanted = "native" if chosen == "native" else f"method is {self.options.method!r}; it"
        if reason is not None and (chosen == "native" or self.options.method == "speculative"):
            raise ValueError(f"{wanted} cannot be used with this model: {reason}")
        if self.options.method == "speculative" and model.heads.k < 2:
            raise ValueError(
                "method is 'speculative', but the model has one head; it must have at least 2 to draft with"
            )
        with torch.no_grad():
            self.decoder: NativeDecoder | HuggingFaceDecoder
            if chosen == "huggingface" or reason is not None:
                self.decoder = HuggingFaceDecoder(model, dtype, sequence.vocabulary.pad)
            else:
                self.decoder = NativeDecoder(model, dtype)

    def __call__(self, prompts: Sequence[np.ndarray], progress: Callable[[int], None] | None = None) -> Generated:
        """Decode one mask per prompt.

        Args:
            prompts: int64 ``[P]`` each, of any lengths, as `SequenceFormat.prompt` makes them.
            progress: called with the number of prompts just finished.

        Returns:
            The masks in the order of the prompts.

        Raises:
            ValueError: there is no prompt.
        """
        if not len(prompts):
            raise ValueError("prompts is empty; it must hold at least one prompt")
        order = np.argsort([-len(p) for p in prompts], kind="stable")
        height, width = self.sequence.mask_grid
        codes = np.empty((len(prompts), height * width), np.int64)
        logprob = np.empty((len(prompts), height * width), np.float32)
        steps = 0.0
        run = speculative if self.options.method == "speculative" else greedy
        training = self.model.training
        self.model.eval()
        started = time.perf_counter()
        try:
            with torch.inference_mode():
                for first in range(0, len(order), self.options.batch_size):
                    chosen = order[first : first + self.options.batch_size]
                    ids, cells = self._tensors([prompts[i] for i in chosen])
                    found, scores, taken = run(self.model.heads, self.decoder, self.target, ids, cells)
                    codes[chosen], logprob[chosen] = found.cpu().numpy(), scores.cpu().numpy()
                    steps += taken * len(chosen)
                    if progress is not None:
                        progress(len(chosen))
        finally:
            self.model.train(training)
        seconds = time.perf_counter() - started
        return Generated(codes.reshape(-1, height, width), logprob, seconds, steps / len(prompts))

    def _tensors(self, prompts: list[np.ndarray]) -> tuple[list[Tensor], list[Tensor]]:
        ids = [torch.as_tensor(np.asarray(p, np.int64), device=self.device) for p in prompts]
        cells = [torch.as_tensor(self.sequence.grid_ids(p), device=self.device) for p in prompts]
        return ids, cells


def generate_masks(
    model: Any,
    prompts: Sequence[np.ndarray],
    *,
    sequence: Any = None,
    options: DecodingOptions | None = None,
    progress: Callable[[int], None] | None = None,
) -> Generated:
    """Decode masks, restricted to the mask codes, with a key-value cache.

    Args:
        model: a `Bundle`, or an `NTPSegModel` together with `sequence`.
        prompts: int64 ``[P]`` each, of any lengths, as `SequenceFormat.prompt` makes them.
        sequence: the model's `SequenceFormat`; taken from a bundle.
        options: see `DecodingOptions`.
        progress: called with the number of prompts just finished.

    Returns:
        Codes, log-probabilities and timing, in the order of the prompts.

    Raises:
        ValueError: no prompt, no sequence format, or options that the model does not allow.
    """
    if sequence is None:
        sequence, model = getattr(model, "sequence", None), getattr(model, "model", model)
        if sequence is None:
            raise ValueError("sequence is None; with a bare model it must be its SequenceFormat")
    return MaskGenerator(model, sequence, options)(prompts, progress)
