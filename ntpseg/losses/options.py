"""What a caller may set and what is returned: the frozen options, the counts, the output."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, NamedTuple

from torch import Tensor

from ntpseg.utils.checks import brief, check_bool, check_choice, check_integer, check_number

BACKENDS = ("auto", "reference", "torch", "triton")
WORKSPACES = ("auto", "small", "fast")
LARGEST = sys.float_info.max


@dataclass(frozen=True)
class LossOptions:
    """Everything about the loss that is not a tensor; one object passes through all layers.

    The first group restates the keywords of `ntp_loss`; the second group exists only here.

    Attributes:
        negatives: m, how many earlier predictions of the same head serve as TCL negatives; 0 switches TCL off. More
            than T are as many as T.
        tcl_weight: factor of TCL in the loss; 0 leaves TCL reported but without gradient.
        het_weight: factor of HET in the loss.
        temperature: tau of TCL and HET.
        head_weights: w_j per head, None for all ones.
        ignore_index: label of an unsupervised position.
        shift: True: head j at position t predicts t + 1 + j; False: t + j (head 0 predicts its own position).
        vocab_range: ``(lo, hi)``: softmax and arg-max see only the classes lo <= v < hi.
        backend: "reference", "torch", "triton" or "auto" (triton on CUDA where it is usable, else torch).
        z_loss: factor of the mean squared log-partition function, PaLM's z-loss (arXiv 2204.02311, section 5);
            0 switches it off. The mean is weighted like CE.
        logit_scale: factor of all logits (Cohere's ``logit_scale``, one over Granite's ``logits_scaling``). Multiplied
            into the hidden states, which rounds them once in their dtype.
        softcap: c > 0: logits become ``c * tanh(z / c)`` after the scale (Gemma 2, arXiv 2408.00118, section 2); None:
            they do not. Runs on the torch backend; backend "auto" chooses that one, also on a GPU.
        label_smoothing: epsilon in [0, 1): the cross-entropy is taken against ``1 - epsilon`` of the target and epsilon
            spread evenly over all classes that take part, as in ``torch.nn.functional.cross_entropy``. Needs
            ``negatives=0``; `NTPOutput.ntp`, ``nll`` and ``margin`` stay those of the target alone.
        gradient_filter: probabilities below this are left out of both gradients where a whole tile is below it
            (cut cross-entropy, arXiv 2411.09009, section 4.3). 0 (the default) keeps the exact gradient; 2**-12 is
            the usual choice, below the resolution of bf16 next to a probability of one. Error bound: each
            row's logit gradient changes by less than this value times its weight per skipped class.
        per_head: also return prediction, nll and margin for every head (``NTPOutput.head_*``).
        max_rows: upper bound, known to the caller, on the supervised rows of one head in one call. The row tables
            then get that fixed size, and finding the rows needs no device-to-host copy. More rows than this are
            an error on the device. None: count them (one synchronisation on a GPU).
        chunk_bytes: byte budget of one block of logits; None lets the backend choose. Overrides `workspace`.
        workspace: how much memory the Triton backend may take beyond the gradients. "small": a gibibyte, and more only
            where too few rows would fit (docs/kernels.md, "Memory"); "fast": as many rows at a time as keep the sum of
            the weight's gradient over them under 2 % of the products' time, at most 8 GiB; "auto" (the default): "fast"
            where that takes a quarter, at most, of what the GPU had to spare when it was first asked, else "small";
            always "small" with `group=` and off CUDA. The rows of one block decide in which order the weight's
            gradient is added up, hence how its last bit rounds; equal calls of one process are divided alike. Other
            backends do not read it.

    Raises:
        ValueError: a field is not as described; the message names it, what it was and what it must be.
    """

    negatives: int = 5
    tcl_weight: float = 1.0
    het_weight: float = 1.0
    temperature: float = 1.0
    head_weights: tuple[float, ...] | None = None
    ignore_index: int = -100
    shift: bool = True
    vocab_range: tuple[int, int] | None = None
    backend: str = "auto"

    z_loss: float = 0.0
    gradient_filter: float = 0.0
    per_head: bool = False
    max_rows: int | None = None
    chunk_bytes: int | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    label_smoothing: float = 0.0
    workspace: str = "auto"

    def __post_init__(self) -> None:
        check_integer("negatives", self.negatives, 0)
        for name in ("tcl_weight", "het_weight", "z_loss"):
            check_number(name, getattr(self, name), 0)
        check_number("temperature", self.temperature, above=0)
        check_number("gradient_filter", self.gradient_filter, 0, below=1)
        check_number("label_smoothing", self.label_smoothing, 0, below=1)
        # a tuple of plain numbers travels through the operator's schema as text, where 2**53 is the last exact integer
        check_integer("ignore_index", self.ignore_index, -(2**53), 2**53)
        check_bool("shift", self.shift)
        check_bool("per_head", self.per_head)
        check_number("logit_scale", self.logit_scale)
        if self.logit_scale == 0:
            raise ValueError(f"logit_scale must not be 0, got {self.logit_scale!r}")
        if self.softcap is not None:
            check_number("softcap", self.softcap, above=0)
        if self.label_smoothing and self.negatives:
            raise ValueError(f"negatives must be 0 with label_smoothing, got {self.negatives}")
        if self.label_smoothing and self.softcap is not None:
            raise ValueError(f"softcap must be None with label_smoothing, got {self.softcap}")
        if self.head_weights is not None:
            object.__setattr__(self, "head_weights", _head_weights(self.head_weights))
        if self.vocab_range is not None:
            object.__setattr__(self, "vocab_range", checked_range(self.vocab_range))
        for name in ("max_rows", "chunk_bytes"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        check_choice("backend", self.backend, BACKENDS)
        check_choice("workspace", self.workspace, WORKSPACES)

    def with_backend(self, name: str) -> LossOptions:
        """The same options with another backend."""
        return dataclasses.replace(self, backend=name)

    def to_text(self) -> str:
        """All values in one line; what a custom operator's schema can carry, and torch.compile can trace."""
        return _pack([getattr(self, name) for name in _FIELDS])

    @staticmethod
    @lru_cache(maxsize=64)
    def from_text(text: str) -> LossOptions:
        """The inverse of `to_text`."""
        return LossOptions(*_unpack(text))  # type: ignore[arg-type]  # in the order of the fields


_FIELDS = tuple(LossOptions.__dataclass_fields__)


def checked_range(value: Any, classes: int | None = None) -> tuple[int, int]:
    """``vocab_range`` as two integers.

    Args:
        value: what the caller gave.
        classes: V, where it is known.

    Raises:
        ValueError: it is no pair of integers with 0 <= lo < hi (<= V).
    """
    bounds = _items(value)
    if len(bounds) == 2 and all([_is_integer(bound) for bound in bounds]):
        low, high = int(bounds[0]), int(bounds[1])
        if classes is not None and 0 <= low < high > classes:
            raise ValueError(f"vocab_range must end within the {classes} classes, got {brief(value)}")
        if 0 <= low < high <= 2**53:
            return low, high
    raise ValueError(f"vocab_range must be two integers (lo, hi) with 0 <= lo < hi, got {brief(value)}")


def is_count(value: Any) -> bool:
    """Whether `value` is one finite number >= 0; a bool is none."""
    return isinstance(value, int | float | Real) and type(value) is not bool and 0 <= value <= LARGEST  # type: ignore[operator]


def _head_weights(value: Any) -> tuple[float, ...]:
    weights = _items(value)
    if not all([is_count(weight) for weight in weights]) or not 0 < sum(weights) <= LARGEST:
        raise ValueError(f"head_weights must be finite numbers >= 0, not all zero, got {brief(value)}")
    return tuple([float(weight) for weight in weights])


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | Integral) and type(value) is not bool


def _items(value: Any) -> tuple[Any, ...]:
    """What a sequence, an array or a tensor holds; nothing for what is none of these."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    try:
        return tuple(value)
    except TypeError:
        return ()


@dataclass(frozen=True)
class NumItems:
    """Counts of a whole accumulated (and, over ranks, global) batch, as denominators.

    Attributes:
        rows: supervised rows per head, k numbers (a sequence, or a tensor ``[k]``). With token weights: their sum.
        het: number of hard-token entries that count; None keeps this call's own number.
    """

    rows: Sequence[float] | Tensor
    het: float | Tensor | None = None


class LossParts(NamedTuple):
    """The parts of the loss, detached 0-dim tensors.

    Attributes:
        ntp, nktp, tcl, het, z: see `NTPOutput`.
    """

    ntp: Tensor
    nktp: Tensor
    tcl: Tensor
    het: Tensor
    z: Tensor


class TokenResults(NamedTuple):
    """Per-token results of every head, ``[B, T, k]`` by the position of the predicted token.

    Attributes:
        prediction, nll, margin: see `NTPOutput`.
    """

    prediction: Tensor
    nll: Tensor
    margin: Tensor


@dataclass(frozen=True)
class NTPOutput:
    """Result of `ntp_loss`. Only `loss` carries a gradient.

    Scalars are float32 (float64 for float64 inputs). Per-token tensors are ``[B, T]``, aligned with the position of
    the token that was to be predicted: prediction int64, nll and margin floating, -1 / 0 / 0 where unsupervised.

    Attributes:
        loss: ``nktp + tcl_weight * tcl + het_weight * het + z_loss * z``, and what label smoothing adds.
        ntp: cross-entropy of head 0.
        nktp: weighted cross-entropy over all heads.
        tcl: token-level contrastive loss.
        het: hard-error-token loss.
        prediction: arg-max of head 0, ties to the lowest id.
        nll: ``lse - z[y]`` of head 0, nats.
        margin: ``max z - z[y]`` of head 0; 0 exactly where the prediction is right.
        z: mean squared log-partition function; None unless ``LossOptions.z_loss`` is on.
        head_prediction, head_nll, head_margin: ``[B, T, k]``, the same for every head (``LossOptions.per_head``).
    """

    loss: Tensor
    ntp: Tensor
    nktp: Tensor
    tcl: Tensor
    het: Tensor
    prediction: Tensor
    nll: Tensor
    margin: Tensor
    z: Tensor | None = None
    head_prediction: Tensor | None = None
    head_nll: Tensor | None = None
    head_margin: Tensor | None = None

    @staticmethod
    def make(loss: Tensor, parts: LossParts, tokens: TokenResults, options: LossOptions) -> NTPOutput:
        """From what a backend returns; leaves out what the options do not ask for."""
        return NTPOutput(
            loss=loss,
            ntp=parts.ntp,
            nktp=parts.nktp,
            tcl=parts.tcl,
            het=parts.het,
            prediction=tokens.prediction[..., 0],
            nll=tokens.nll[..., 0],
            margin=tokens.margin[..., 0],
            z=parts.z if options.z_loss else None,
            head_prediction=tokens.prediction if options.per_head else None,
            head_nll=tokens.nll if options.per_head else None,
            head_margin=tokens.margin if options.per_head else None,
        )


_Value = None | bool | int | float | str | tuple[float, ...] | tuple[int, ...]


def _pack(values: list[_Value]) -> str:
    """One string for a list of None, booleans, numbers, short words and tuples of numbers.

    JSON or ``repr`` would do, but torch.compile can follow neither where it holds a number as dynamic; ``float.hex`` it
    can, and that is exact (for whole numbers up to 2**53).
    """
    return ";".join([_pack_one(value) for value in values])


def _unpack(text: str) -> list[_Value]:
    """The inverse of `_pack`."""
    return [_unpack_one(item) for item in text.split(";")]


def _pack_one(value: _Value) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return "'" + value
    if isinstance(value, tuple):
        return "(" + ",".join([_pack_one(item) for item in value])
    if isinstance(value, int):
        return "i" + float(min(value, 2**53)).hex()  # larger ones are bounds that nothing reaches
    return "f" + float(value).hex()


def _unpack_one(item: str) -> _Value:
    if item in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[item]
    if item.startswith("'"):
        return item[1:]
    if item.startswith("("):
        return tuple(_unpack_one(part) for part in item[1:].split(","))  # type: ignore[return-value]  # never nested
    number = float.fromhex(item[1:])
    return int(number) if item.startswith("i") else number
