"""Masks from prompts: batching by length, the choice of the decoder, timing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import torch

from ntpseg.generation.decoder import DecodedBatch, Decoder, PromptBatch, StreamingMethodFunction, TargetTemplate
from ntpseg.generation.huggingface import HuggingFaceDecoder
from ntpseg.generation.methods import METHODS, DecodingMethod
from ntpseg.generation.native import NativeDecoder, unsupported_reason
from ntpseg.generation.options import DecodingOptions, Generated, NonFiniteOutput, resolve_dtype
from ntpseg.generation.token_stream import TokenListener, TokenSink
from ntpseg.losses.dense import from_patches

if TYPE_CHECKING:
    from ntpseg.models.bundle import Bundle
    from ntpseg.models.config import NTPSegConfig
    from ntpseg.models.model import NTPSegModel
    from ntpseg.tokenizers.sequence import SequenceFormat


class MaskGenerator:
    """A model prepared for decoding; keep it while the weights do not change.

    Args:
        model: an `NTPSegModel`, in either mode; it decodes in eval mode and is left as it was.
        sequence: its `SequenceFormat`.
        options: see `DecodingOptions`.

    Attributes:
        decoder: the `Decoder` that the options and the model allow.

    Raises:
        ValueError: the options ask for a decoder or a method that the model does not allow.
    """

    def __init__(self, model: NTPSegModel, sequence: SequenceFormat, options: DecodingOptions | None = None) -> None:
        self.model, self.sequence, self.options = model, sequence, options or DecodingOptions()
        self.device = next(model.parameters()).device
        self.target = TargetTemplate(
            sequence, self.device, model.readout, model.config.blank_token, draft_source(model.config)
        )
        method = METHODS[self.options.method]
        _check_method(model, self.options, method)
        self.method = method.load()
        with torch.no_grad():
            self.decoder = make_decoder(model, sequence, self.options, method)

    def __call__(
        self,
        prompts: Sequence[np.ndarray],
        progress: Callable[[int], None] | None = None,
        pixel_values: np.ndarray | None = None,
        listener: TokenListener | None = None,
    ) -> Generated:
        """Decode one mask per prompt.

        Args:
            prompts: int64 ``[P]`` each, of any lengths, as `SequenceFormat.prompt` returns them.
            pixel_values: float32 ``[N, C, S, S]`` in [-1, 1], the images; needed by models with a stem.
            progress: called with the number of prompts just finished.
            listener: called with the tokens, see `DecodedTokens`: as they are decoded where the method ``streams``,
                else once a batch is decoded. The result is the same.

        Returns:
            The masks in the order of the prompts.

        Raises:
            ValueError: there is no prompt, one is no vector of the model's token ids, or there are not as many finite
                images as prompts where images are needed.
            NonFiniteOutput: a log-probability or a pixel's probability is not finite.
        """
        if not len(prompts):
            raise ValueError("prompts must hold at least one prompt, got none")
        _check_prompts(prompts, self.model.config.vocab_size)
        if self.model.front_end is not None and (pixel_values is None or len(pixel_values) != len(prompts)):
            count = 0 if pixel_values is None else len(pixel_values)
            raise ValueError(f"pixel_values must hold an image for each of {len(prompts)} prompts, got {count}")
        if self.model.front_end is not None and not np.isfinite(np.asarray(pixel_values, np.float32)).all():
            raise ValueError("pixel_values must be finite, got infinite or not-a-number pixels")
        order = np.argsort([-len(p) for p in prompts], kind="stable")
        height, width = self.sequence.mask_grid
        codes = np.empty((len(prompts), height * width), np.int64)
        logprob = np.empty((len(prompts), height * width), np.float32)
        probability = None
        if self.options.expected_readout:
            factor = self.model.config.patch_size
            probability = np.empty((len(prompts), height * factor, width * factor), np.float32)
        steps = 0
        training = self.model.training
        self.model.eval()
        started = time.perf_counter()
        try:
            with torch.inference_mode():
                for first in range(0, len(order), self.options.batch_size):
                    chosen = order[first : first + self.options.batch_size]
                    batch = self._batch(
                        [prompts[i] for i in chosen], None if pixel_values is None else pixel_values[chosen]
                    )
                    sink = None if listener is None else TokenSink(listener, chosen.tolist())
                    decoded = self._decode(batch, sink)
                    codes[chosen], logprob[chosen] = decoded.codes.cpu().numpy(), decoded.logprob.cpu().numpy()
                    if probability is not None and decoded.patches is not None:
                        probability[chosen] = from_patches(decoded.patches, (height, width)).cpu().numpy()
                    steps += decoded.steps * len(chosen)
                    if progress is not None:
                        progress(len(chosen))
        finally:
            self.model.train(training)
        odd = ~np.isfinite(logprob).all(1)
        if probability is not None:
            odd |= ~np.isfinite(probability).all((1, 2))
        if odd.any():
            raise NonFiniteOutput(
                f"the model's output must be finite, got nan or inf for {odd.sum()} of {len(prompts)} masks with dtype "
                f"{self.options.dtype}; decode with dtype float32, or train the model again"
            )
        seconds = time.perf_counter() - started
        return Generated(codes.reshape(-1, height, width), logprob, seconds, steps / len(prompts), probability)

    def _decode(self, batch: PromptBatch, sink: TokenSink | None) -> DecodedBatch:
        place = (self.model.heads, self.decoder, self.target, batch, self.options)
        if sink is None:
            return self.method(*place)
        if METHODS[self.options.method].streams:
            return cast(StreamingMethodFunction, self.method)(*place, sink=sink)
        decoded = self.method(*place)
        for row in range(len(batch)):
            patches = None if decoded.patches is None else decoded.patches[row]
            sink.write(row, 0, decoded.codes[row], decoded.logprob[row], patches)
        return decoded

    def _batch(self, prompts: list[np.ndarray], pixel_values: np.ndarray | None) -> PromptBatch:
        ids = [torch.as_tensor(np.asarray(p, np.int64), device=self.device) for p in prompts]
        stem = None
        if self.model.front_end is not None and pixel_values is not None:
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.sequence.vocabulary.pad)
            # Several sentences on one image: what does not depend on the sentence is computed once.
            seen: dict[bytes, int] = {}
            image_of = [seen.setdefault(pixels.tobytes(), row) for row, pixels in enumerate(pixel_values)]
            own, places = np.unique(image_of, return_inverse=True)
            shared = None if len(own) == len(ids) else torch.as_tensor(places, device=self.device)
            stem = self.model.encode_image(torch.as_tensor(pixel_values[own], device=self.device), padded, shared)
        return PromptBatch(
            ids=ids,
            grid_ids=[torch.as_tensor(self.sequence.grid_ids(p), device=self.device) for p in prompts],
            stem=stem,
        )


def draft_source(config: NTPSegConfig) -> Literal["stem", "blanks"] | None:
    """Where a model of this configuration has a draft of a whole mask, see `TargetTemplate`."""
    if config.front_end != "codes" and (config.dense_loss or {}).get("pixel"):
        return "stem"
    return "blanks" if (config.mask_inputs or {}).get("blank") else None


def _check_prompts(prompts: Sequence[np.ndarray], vocab_size: int) -> None:
    """Raise a `ValueError` unless each is a vector of ids: a cast would cut floats, an embedding has no such row."""
    for index, prompt in enumerate(prompts):
        ids = np.asarray(prompt)
        if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"prompts must be int64 [P] each, P >= 1, got {ids.dtype} {list(ids.shape)} at {index}")
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise ValueError(
                f"prompts must hold ids within [0, {vocab_size}), got {ids.min()} to {ids.max()} at {index}"
            )


def _check_method(model: NTPSegModel, options: DecodingOptions, method: DecodingMethod) -> None:
    """Raise a `ValueError` unless the model has what the method and the read-out need."""
    if model.heads.k < method.min_heads:
        raise ValueError(
            f"model must have at least {method.min_heads} heads for method {method.name!r}, got {model.heads.k}"
        )
    if model.readout is None and (method.needs_readout or options.expected_readout):
        raise ValueError(f"model must have a read-out of expected patches for method {method.name!r}, got none")
    inputs = model.config.mask_inputs
    if method.needs_blanks and not (inputs and inputs["blank"]):
        raise ValueError(
            f"model must have been trained on blank mask tokens (mask_inputs.blank above 0) for method "
            f"{method.name!r}, got mask_inputs {inputs}"
        )


def make_decoder(
    model: NTPSegModel, sequence: SequenceFormat, options: DecodingOptions, method: DecodingMethod
) -> Decoder:
    """The decoder that the options name, or with "auto" the quickest that supports the model.

    Raises:
        ValueError: the options or the method need `NativeDecoder`, which does not support the model.
    """
    dtype = resolve_dtype(options.dtype, model)
    reason = unsupported_reason(model.backbone)
    if reason is None and options.decoder != "huggingface":
        return NativeDecoder(model, dtype)
    if options.decoder == "native":
        raise ValueError(f"decoder must be auto or huggingface for this model, got 'native': {reason}")
    if method.needs_rewind:
        raise ValueError(f"method must be one without rewinding for this model, got {method.name!r}: {reason}")
    return HuggingFaceDecoder(model, dtype, sequence.vocabulary.pad)


def generate_masks(
    model: Bundle | NTPSegModel,
    prompts: Sequence[np.ndarray],
    *,
    sequence: SequenceFormat | None = None,
    options: DecodingOptions | None = None,
    progress: Callable[[int], None] | None = None,
    pixel_values: np.ndarray | None = None,
) -> Generated:
    """Decode masks, restricted to the mask codes, with a key-value cache.

    Args:
        model: a `Bundle`, or an `NTPSegModel` together with `sequence`.
        prompts: int64 ``[P]`` each, of any lengths, as `SequenceFormat.prompt` returns them.
        sequence: the model's `SequenceFormat`; taken from a bundle.
        options: see `DecodingOptions`.
        progress: called with the number of prompts just finished.
        pixel_values: float32 ``[N, C, S, S]`` in [-1, 1], the images; needed by models with a stem.

    Returns:
        Codes, log-probabilities and timing, in the order of the prompts.

    Raises:
        ValueError: no prompt, no sequence format, or options that the model does not allow.
    """
    if sequence is None:
        sequence, model = getattr(model, "sequence", None), getattr(model, "model", model)
        if sequence is None:
            raise ValueError("sequence must be the SequenceFormat of a model without a bundle, got None")
    return MaskGenerator(cast("NTPSegModel", model), sequence, options)(prompts, progress, pixel_values)
