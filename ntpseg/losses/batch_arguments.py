"""What a batch may carry for the fused loss, besides the arguments of the model's own forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ntpseg.losses.deferred_logits import CannotFuse
from ntpseg.losses.options import LossOptions, NumItems

if TYPE_CHECKING:
    from ntpseg.memory import HardTokens

# The columns of a data set and what a collator adds; Trainer drops those that the forward's signature does not name.
BATCH_KEYS = (
    "het_position",
    "het_token",
    "token_weights",
    "shift_labels",
    "num_het_in_batch",
    "num_weights_in_batch",
)


@dataclass(frozen=True)
class BatchArguments:
    """The arguments of one call that are the loss's.

    Attributes:
        num_items_in_batch, num_het_in_batch, num_weights_in_batch: counts of the whole accumulated (and, over ranks,
            global) batch: supervised tokens, hard tokens that count, and the sum of the weights of supervised tokens.
            A `NumItems` as the first stands for all three.
        het_position, het_token: ``[B, n]`` int64.
        token_weights: ``[B, T]`` float.
        shift_labels: ``[B, T]`` int64.
    """

    num_items_in_batch: NumItems | float | Tensor | None = None
    num_het_in_batch: float | Tensor | None = None
    num_weights_in_batch: float | Tensor | None = None
    het_position: Tensor | None = None
    het_token: Tensor | None = None
    token_weights: Tensor | None = None
    shift_labels: Tensor | None = None

    def check_labels(self) -> None:
        """For a call without labels.

        Raises:
            ValueError: there is something for a loss, which such a call has not.
        """
        for name in BATCH_KEYS:
            if getattr(self, name) is not None:
                raise CannotFuse(
                    f"labels must be given with {name}, got None: without them there is no loss to use it (where there "
                    "are shift_labels alone, pass them as labels too)"
                )

    def loss_arguments(self, options: LossOptions) -> dict[str, Any]:
        """``het``, ``num_items`` and ``token_weights`` of `ntp_loss`.

        Raises:
            ValueError: half of the hard tokens is missing; a count is missing where others are given, so that a part of
                the loss would have another batch's denominator; or the labels were counted by another ignore_index.
        """
        if options.ignore_index != -100 and self.num_items_in_batch is not None:
            raise CannotFuse(
                f"ignore_index must be -100 with num_items_in_batch, got {options.ignore_index}: Trainer counts the "
                "labels that are not -100"
            )
        return {"het": self._hard_tokens(), "num_items": self._num_items(), "token_weights": self.token_weights}

    def _hard_tokens(self) -> HardTokens | None:
        from ntpseg.memory import HardTokens

        position, token = self.het_position, self.het_token
        if (position is None) != (token is None):  # half of them would be none, without a word
            missing, other = ("het_position", "het_token") if position is None else ("het_token", "het_position")
            raise ValueError(f"{missing} must be given with {other}, got None")
        return None if position is None or token is None else HardTokens(position, token)

    def _num_items(self) -> NumItems | None:
        items, weights, het = self.num_items_in_batch, self.num_weights_in_batch, self.num_het_in_batch
        if isinstance(items, NumItems):
            if weights is not None or het is not None:
                raise ValueError("num_items_in_batch must be one number with further counts, got a NumItems")
            counts = items
        else:
            if items is None:
                for name, count in {"num_het_in_batch": het, "num_weights_in_batch": weights}.items():
                    if count is not None:  # such a Trainer divides by the number of micro-batches besides
                        raise CannotFuse(f"num_items_in_batch must be given with {name}, got None")
                return None
            rows = items if weights is None else weights
            if self.token_weights is not None and weights is None:
                raise CannotFuse(
                    "num_weights_in_batch must be given with token_weights and num_items_in_batch, got None: the "
                    "denominator is the sum of the weights over the whole batch, which Trainer does not count"
                )
            counts = NumItems(rows=rows.reshape(-1) if isinstance(rows, Tensor) else [rows], het=het)
        if counts.het is None and self.het_position is not None:
            raise CannotFuse(
                "num_het_in_batch must be given with het_position and num_items_in_batch, got None: the denominator of "
                "HET is the number of hard tokens in the whole batch, which Trainer does not count"
            )
        return counts
