"""Logits that are not there: what a fused output head returns while its model computes a loss.

The model's own forward runs unchanged on this object. It records what the model does to its logits as long as the
loss can do the same (scale, softcap, a change of dtype, a slice of positions, the first classes only), and refuses
everything else, so that no change of the logits is ever lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class CannotFuse(ValueError):
    """A model whose loss the fused one cannot stand for; the message says why."""


class UnsupportedLogits(CannotFuse, AttributeError):
    """A model does to its logits what the fused loss cannot; an AttributeError too, so that ``hasattr`` works."""


@dataclass(frozen=True, eq=False)
class DeferredLogits:
    """``outer * tanh(inner * z)`` if `squashed`, else ``inner * z``, of the logits z of an output head.

    Attributes:
        hidden: ``[B, T, D]``, what the head was given.
        head: what `call_head` calls.
        classes: how many classes, from the first.
        biased: whether the head adds a bias.
        dtype: of the logits.
        inner, squashed, outer: see above; `outer` is 1 unless `squashed`.
        ignore_masks: leave out masks of classes that the model writes into its logits (``logits[..., ids] = -inf``).
        cross_entropy: what ``F.cross_entropy`` of these logits is; None: refused, and so is flattening them for it.
        flat: ``[B * T, V]`` to the outside.
        transposed: ``[B, V, T]`` to the outside, for nothing but ``F.cross_entropy``.
    """

    hidden: Tensor
    head: nn.Module
    classes: int
    biased: bool
    dtype: torch.dtype
    inner: float = 1.0
    squashed: bool = False
    outer: float = 1.0
    ignore_masks: bool = False
    cross_entropy: Callable[..., Tensor] | None = None
    flat: bool = False
    transposed: bool = False

    _TORCH_FUNCTIONS: ClassVar[dict[str, str]] = {
        "mul": "__mul__",
        "multiply": "__mul__",
        "div": "__truediv__",
        "true_divide": "__truediv__",
        "divide": "__truediv__",
        "tanh": "tanh",
        "logsumexp": "logsumexp",
        "transpose": "transpose",
        "permute": "permute",
    }

    @property
    def logit_scale(self) -> float:
        """Factor of the head's logits before the softcap."""
        return self.inner * self.outer

    @property
    def softcap(self) -> float | None:
        """c of ``c * tanh(z / c)``, None without one."""
        return abs(self.outer) if self.squashed else None

    @property
    def shape(self) -> torch.Size:
        """``[B, T, V]``, ``[B * T, V]`` if `flat` or ``[B, V, T]`` if `transposed`."""
        leading = self.hidden.shape[:-1]
        if self.transposed:
            return torch.Size((leading[0], self.classes, leading[1]))
        return torch.Size((leading.numel(), self.classes) if self.flat else (*leading, self.classes))

    @property
    def device(self) -> torch.device:
        """The device of the hidden states."""
        return self.hidden.device

    def size(self, dim: int | None = None) -> Any:
        """As in a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As in a tensor."""
        return len(self.shape)

    ndim = property(dim)

    def call_head(self, **arguments: Any) -> Any:
        """What the head makes of these logits (`ntpseg.losses.lm_head`): themselves, or a loss if labels are given.

        They are given twice, since hooks of the head change what is passed by position.
        """
        return self.head(self, deferred=self, **arguments)

    def logits(self) -> Tensor:
        """The logits after all, ``[B, T, V]``."""
        return self.call_head()

    def finish(self, z: Tensor) -> Tensor:
        """What the model does to the logits `z` of the head."""
        z = z[..., : self.classes]
        if self.squashed:
            return (torch.tanh(z * self.inner) * self.outer).to(self.dtype)
        return (z * self.inner if self.inner != 1 else z).to(self.dtype)

    # what the loss can do as well

    def float(self) -> DeferredLogits:
        return dataclasses.replace(self, dtype=torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> DeferredLogits:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.dtype):
                return dataclasses.replace(self, dtype=value)
            if isinstance(value, Tensor):
                return dataclasses.replace(self, dtype=value.dtype)
        return self  # the loss moves labels to the hidden states instead

    type_as = to

    def contiguous(self, *_: Any, **__: Any) -> DeferredLogits:
        return self

    def reshape(self, *shape: Any) -> DeferredLogits:
        sizes = tuple(shape[0]) if len(shape) == 1 else shape
        if self.transposed:
            raise self._refusal(f".view{sizes} of the transposed ones")
        if self.cross_entropy is None or sizes not in ((-1, self.classes), (self.shape[:-1].numel(), self.classes)):
            raise self._refusal(f".view{sizes} of them")
        return dataclasses.replace(self, flat=True)

    view = reshape

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> DeferredLogits:
        if (start_dim, end_dim) not in ((0, -2), (0, self.dim() - 2)):
            raise self._refusal(f".flatten({start_dim}, {end_dim}) of them")
        return self.reshape(-1, self.classes)

    def transpose(self, dim0: int, dim1: int) -> DeferredLogits:
        pair = {dim0 % 3, dim1 % 3}
        if self.cross_entropy is None or self.flat or self.transposed or self.dim() != 3 or pair != {1, 2}:
            raise self._refusal(f".transpose({dim0}, {dim1}) of them")
        return dataclasses.replace(self, transposed=True)

    def permute(self, *dims: Any) -> DeferredLogits:
        order = tuple(dims[0]) if len(dims) == 1 else dims
        if self.dim() != 3 or [dim % 3 for dim in order] != [0, 2, 1]:
            raise self._refusal(f".permute{order} of them")
        return self.transpose(1, 2)

    def __mul__(self, factor: Any) -> DeferredLogits:
        if isinstance(factor, Tensor) and factor.numel() == 1 and not self.squashed and not self.biased:
            return dataclasses.replace(self, hidden=self.hidden * factor.reshape(()).to(self.hidden.dtype))
        if not isinstance(factor, int | float) or factor == 0:
            raise self._refusal(f"multiplying them by {_shown(factor)}")
        if self.squashed:
            return dataclasses.replace(self, outer=self.outer * factor)
        return dataclasses.replace(self, inner=self.inner * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> DeferredLogits:
        if isinstance(divisor, Tensor) and divisor.numel() == 1:
            return self * divisor.reciprocal()
        if not isinstance(divisor, int | float) or divisor == 0:
            raise self._refusal(f"dividing them by {_shown(divisor)}")
        return self * (1 / divisor)

    def tanh(self) -> DeferredLogits:
        if self.squashed:
            raise self._refusal("a second tanh")
        return dataclasses.replace(self, squashed=True)

    def logsumexp(self, dim: int = -1, keepdim: bool = False) -> Tensor:
        if dim not in (-1, 2) or keepdim or self.transposed:
            raise self._refusal(f"logsumexp over dimension {dim}")
        return self.call_head(log_sum_exp=True)

    def __getitem__(self, index: Any) -> DeferredLogits:
        if self.flat or self.transposed:
            raise self._refusal(f"indices into the {'flattened' if self.flat else 'transposed'} ones")
        parts = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in [part for part in parts if not isinstance(part, Tensor)]:
            at = parts.index(Ellipsis)
            parts[at : at + 1] = [slice(None)] * (self.hidden.dim() + 1 - len(parts))
        parts += [slice(None)] * (self.hidden.dim() - len(parts))
        if len(parts) != self.hidden.dim() or not all(isinstance(part, slice) for part in parts):
            raise self._refusal(f"taking [{_shown(index)}] of them")
        *rows, last = parts
        if last.start not in (None, 0) or last.step not in (None, 1):
            raise self._refusal(f"leaving out their first classes ({last})")
        classes = len(range(*last.indices(self.classes)))
        return dataclasses.replace(self, hidden=self.hidden[tuple(rows)], classes=classes)

    def __setitem__(self, index: Any, value: Any) -> None:
        if not self.ignore_masks:
            raise self._refusal("writing into them (a mask of classes)")
        # only what hides classes may be left out: another value there, or a position, is a loss of the model's own
        lowest = isinstance(value, int | float) and value <= torch.finfo(self.dtype).min
        if not lowest or not _selects_classes(index, self.dim()):
            raise self._refusal(f"writing {_shown(value)} into [{_shown(index)}] of them, which masks no classes")

    # what it cannot

    def __getattr__(self, name: str) -> Any:
        raise self._refusal(f".{name} of them")

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], _: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", str(function)).strip("_")
        flat = [value for arg in args for value in (arg if isinstance(arg, list | tuple) else [arg])]
        found = [value for value in (*flat, *(kwargs or {}).values()) if isinstance(value, DeferredLogits)]
        first = found[0]
        if name == "cross_entropy" and first.cross_entropy is not None and args[0] is first:
            return first.cross_entropy(*args, **(kwargs or {}))
        method = cls._TORCH_FUNCTIONS.get(name)
        if method is not None and args and args[0] is first:
            return getattr(first, method)(*args[1:], **(kwargs or {}))
        if method == "__mul__" and len(args) == 2 and args[1] is first:
            return first * args[0]
        raise first._refusal(f"torch's {name} of them")

    def _refusal(self, what: str) -> UnsupportedLogits:
        if self.cross_entropy is not None:
            return UnsupportedLogits(
                "the head's logits must go to F.cross_entropy, and be no more than scaled, capped, sliced, flattened "
                f"or transposed on the way, got {what}. The fused loss has no such logits: leave this use of them "
                "outside of fused_cross_entropy, or call ntp_loss on the hidden states"
            )
        return UnsupportedLogits(
            "model must take its loss from self.loss_function(logits, labels) and do no more to its logits than "
            f"scale or cap them, got {what}. The fused loss has no such logits: train this model with its own loss, or "
            "call ntp_loss on its hidden states"
        )


def _refuse_operator(name: str) -> Callable[..., Any]:
    def operator(self: DeferredLogits, *_: Any) -> Any:
        raise self._refusal(f"{name} on them")

    return operator


for _name in ("add", "radd", "sub", "rsub", "neg", "pow", "matmul", "rtruediv", "iter", "len", "lt", "gt", "le", "ge"):
    setattr(DeferredLogits, f"__{_name}__", _refuse_operator(f"__{_name}__"))


def _selects_classes(index: Any, dims: int) -> bool:
    """Whether an index of logits takes all positions, and of the last dimension some classes."""
    *rows, last = index if isinstance(index, tuple) else (index,)
    spread = any(part is Ellipsis for part in rows)
    if len(rows) != dims - 1 and not (spread and len(rows) <= dims):
        return False
    if not all(part is Ellipsis or (isinstance(part, slice) and part == slice(None)) for part in rows):
        return False
    if isinstance(last, Tensor):
        return last.dim() <= 1
    ids = last if isinstance(last, list | tuple) else [last]
    return isinstance(last, slice) or all(isinstance(id_, int) for id_ in ids)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):  # an index: the repr of a tensor in it may take several lines
        return f"({', '.join(map(_shown, value))})"
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
