"""The k prediction heads: per-head transforms, and the module that owns the output matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntpseg.losses import NTPOutput, ntp_loss
from ntpseg.losses.options import checked_range
from ntpseg.utils.checks import check_integer

if TYPE_CHECKING:
    from ntpseg.models.sequence_parallel import SequenceGroup


class NextKHeads(nn.Module):
    """k heads on one hidden state; head j predicts the token 1 + j positions ahead.

    Head 0 is the plain language-model head. Head j >= 1 sees ``h + SiLU(A_j h + b_j)``, the residual block of
    Medusa-1 (arXiv 2401.10774): D^2 parameters a head where an output matrix of its own would take V * D. ``A_j`` and
    ``b_j`` start at zero, so every head starts as head 0.

    Every use of the output matrix runs inside `forward`, because ZeRO-3 and FSDP gather parameters in hooks that fire
    on ``__call__``; `loss` and `logits` call it.

    Args:
        hidden_size: D.
        vocab_size: V.
        k: number of heads.
        shared: one ``[V, D]`` matrix for all heads (default), or one each, ``[k, V, D]``.

    Attributes:
        weight: ``[V, D]`` or ``[k, V, D]``; may be tied to the input embedding when shared.
        transform_weight, transform_bias: ``[k - 1, D, D]`` and ``[k - 1, D]``; absent for k = 1.

    Raises:
        ValueError: a size is not an integer >= 1.
    """

    def __init__(self, hidden_size: int, vocab_size: int, k: int = 1, *, shared: bool = True) -> None:
        super().__init__()
        for name, value in {"hidden_size": hidden_size, "vocab_size": vocab_size, "k": k}.items():
            check_integer(name, value, 1)
        self.hidden_size, self.vocab_size, self.k, self.shared = hidden_size, vocab_size, k, shared
        self.weight = nn.Parameter(
            torch.empty(vocab_size, hidden_size) if shared else torch.empty(k, vocab_size, hidden_size)
        )
        if k > 1:
            # Raw parameters rather than nn.Linear: Hugging Face's _init_weights would draw those from a normal
            self.transform_weight = nn.Parameter(torch.empty(k - 1, hidden_size, hidden_size))
            self.transform_bias = nn.Parameter(torch.empty(k - 1, hidden_size))
        self.init_weights()

    def init_weights(
        self,
        std: float = 0.02,
        normal_: Callable[..., Any] | None = None,
        zeros_: Callable[..., Any] | None = None,
    ) -> None:
        """Draws the output matrix from N(0, std) and zeroes the transforms.

        Args:
            std: standard deviation, ``config.initializer_range``.
            normal_, zeros_: a Hugging Face model's ``_init_weights`` passes ``transformers.initialization``'s own,
                which leave alone what was loaded from a checkpoint; PyTorch's by default.
        """
        # Looked up now: transformers replaces them where weights are about to be loaded.
        normal_, zeros_ = normal_ or nn.init.normal_, zeros_ or nn.init.zeros_
        normal_(self.weight, mean=0.0, std=std)
        if self.k > 1:
            zeros_(self.transform_weight)
            zeros_(self.transform_bias)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        *,
        logits_of: int = 0,
        vocab_range: tuple[int, int] | None = None,
        share_classes: SequenceGroup | None = None,
        **kwargs: Any,
    ) -> Any:
        """Head states, the loss or logits, whichever is asked for.

        Args:
            hidden: ``[B, T, D]`` (any leading shape without `labels`).
            labels: ``[B, T]`` int64: return the loss, as `loss` does but with the fields of `NTPOutput` in a tuple.
            logits_of: n > 0: return the logits of the first n heads.
            vocab_range: ``(lo, hi)``, for the loss and the logits.
            share_classes: ranks with the same `hidden` and `labels`, each of which computes the loss of its part of
                the classes; None: this one computes that of all. Only with `labels`.
            **kwargs: further arguments of `ntp_loss`; only with `labels`.

        Returns:
            ``[..., k, D]`` head states; or the fields of `NTPOutput`; or ``[..., n, V']`` logits.

        Raises:
            ValueError: `hidden` does not end in D, or `logits_of` is above k.
        """
        if hidden.shape[-1] != self.hidden_size:
            raise ValueError(f"hidden must end in {self.hidden_size} features, got shape {list(hidden.shape)}")
        if labels is not None:
            weight: Tensor = self.weight
            if share_classes is not None:
                weight = share_classes.own_classes(weight)
                kwargs["group"] = share_classes.group
            out = ntp_loss(self._states(hidden, self.k), weight, labels, vocab_range=vocab_range, **kwargs)
            # ZeRO-3 gathers the parameters for backward in hooks on the output's tensors; it looks into tuples only.
            return tuple(getattr(out, field.name) for field in dataclasses.fields(out))
        if kwargs:
            raise ValueError(f"labels must be given with {min(kwargs)}, got None")
        if not logits_of:
            return self._states(hidden, self.k)
        check_integer("logits_of", logits_of, 1, self.k)
        low, high = (0, self.vocab_size) if vocab_range is None else checked_range(vocab_range, self.vocab_size)
        states = self._states(hidden, logits_of)
        weight = self.weight[..., low:high, :].to(states.dtype)
        return F.linear(states, weight) if self.shared else torch.einsum("...kd,kvd->...kv", states, weight[:logits_of])

    def loss(self, hidden: Tensor, labels: Tensor, **kwargs: Any) -> NTPOutput:
        """`ntp_loss` of all k heads on ``[B, T, D]`` states with this module's weight."""
        return NTPOutput(*self(hidden, labels, **kwargs))

    def logits(self, hidden: Tensor, *, heads: int = 1, vocab_range: tuple[int, int] | None = None) -> Tensor:
        """Logits of the first `heads` heads: ``[..., heads, V']``; class v of the result is ``v + lo``."""
        return self(hidden, logits_of=heads, vocab_range=vocab_range)

    @torch.no_grad()
    def resize(self, vocab_size: int) -> None:
        """Cuts the output matrix to `vocab_size` rows, or adds rows that are the mean of those that are there."""
        weight = self.weight
        more = max(vocab_size - self.vocab_size, 0)
        mean = weight.mean(-2, keepdim=True).expand(*weight.shape[:-2], more, -1)
        kept = torch.cat([weight[..., :vocab_size, :], mean], -2)
        self.weight = nn.Parameter(kept, requires_grad=weight.requires_grad)
        self.vocab_size = vocab_size

    def extra_repr(self) -> str:
        """The sizes."""
        return f"hidden_size={self.hidden_size}, vocab_size={self.vocab_size}, k={self.k}, shared={self.shared}"

    def _states(self, hidden: Tensor, count: int) -> Tensor:
        first = hidden.unsqueeze(-2)
        if count == 1:
            return first
        weight, bias = self.transform_weight[: count - 1], self.transform_bias[: count - 1]
        later = F.linear(hidden, weight.flatten(0, 1).to(hidden.dtype), bias.flatten().to(hidden.dtype))
        later = first + F.silu(later.unflatten(-1, (count - 1, self.hidden_size)))
        return torch.cat([first.to(later.dtype), later], -2)
