"""What is supervised and what counts: the one place that says so, for every backend and for the trainer.

Row ``(b, t, j)``, head j at position t, predicts position ``p = t + shift + j`` and is supervised when ``p < T`` and
``labels[b, p] != ignore_index``. A hard token ``(p, e)`` counts when head 0's row of position p is supervised, e
differs from the label and lies in the vocabulary range.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ntpseg.losses.options import LossOptions, NumItems
from ntpseg.losses.value_checks import check_labels, check_token_weights
from ntpseg.utils.checks import check_integer
from ntpseg.utils.tensor_checks import check_device, check_tensor, readable, shown

if TYPE_CHECKING:
    from ntpseg.memory import HardTokens


class Supervision(NamedTuple):
    """What, in one call, decides which rows there are and what they weigh.

    Attributes:
        labels: ``[B, T]`` int64, ids of the whole vocabulary.
        het_position, het_token: ``[B, n]`` int64 or None.
        token_weights: ``[B, T]`` float or None, by the position of the predicted token.
        num_rows: ``[k]`` float or None, replaces the row counts.
        num_het: 0-dim float or None, replaces the entry count.
        signed_weights: the token weights are an incoming gradient's: of either sign, and not finite if it is not.
    """

    labels: Tensor
    het_position: Tensor | None = None
    het_token: Tensor | None = None
    token_weights: Tensor | None = None
    num_rows: Tensor | None = None
    num_het: Tensor | None = None
    signed_weights: bool = False


def count_items(
    labels: Tensor,
    k: int,
    *,
    het: HardTokens | None = None,
    vocab_range: tuple[int, int] | None = None,
    ignore_index: int = -100,
    shift: bool = True,
    token_weights: Tensor | None = None,
) -> NumItems:
    """Counts a batch as `ntpseg.ntp_loss` does, for ``num_items`` of an accumulated or distributed batch.

    Add up the counts of all micro-batches (and ranks), give every call the sums, and add up the losses: that is the
    loss of the whole. Nothing here synchronises: values are checked on the CPU alone, and on a GPU by `ntp_loss`.

    Args:
        labels: ``[B, T]`` int64, unshifted.
        k: number of heads.
        het: hard tokens ``[B, n]`` of the batch.
        vocab_range, ignore_index, shift, token_weights: as `ntpseg.ntp_loss` is given them. Without `vocab_range` a
            hard token counts whatever its id, as long as that is not negative.

    Returns:
        `NumItems` on the device of `labels`: ``rows`` ``[k]`` and ``het`` 0-dim, both float64.

    Raises:
        ValueError: an argument is not as described; the message names it, what it was and what it must be.
    """
    check_integer("k", k, 1)
    check_tensor("labels", labels, "integer", ("B", "T"))
    if labels.shape[1] < 1:
        raise ValueError(f"labels must have T >= 1 positions, got {shown(labels)}")
    check_supervision(labels, het, token_weights, labels.shape[0], labels.shape[1])
    options = LossOptions(vocab_range=vocab_range, ignore_index=ignore_index, shift=shift)
    if readable(labels):
        check_labels(labels, options, None)
        if token_weights is not None:
            check_token_weights(token_weights, labels, options, torch.float64)
    entries = torch.zeros((), dtype=torch.float64, device=labels.device)
    if het is not None:
        entries = counted_entries(labels, het.position, het.token, options).sum(dtype=torch.float64)
    return NumItems(rows=count_rows(labels, k, token_weights, options), het=entries)


def count_rows(labels: Tensor, k: int, token_weights: Tensor | None, options: LossOptions) -> Tensor:
    """``[k]`` float64: supervised rows of each head, or the sum of their token weights."""
    weight = (labels != options.ignore_index).double()
    if token_weights is not None:
        weight = torch.where(weight > 0, token_weights.double(), 0.0)
    # a sum per head is deterministic on every device, and exactly zero where there is nothing
    reached = max(min(k, weight.shape[1] - int(options.shift)), 1)
    rows = torch.stack([weight[:, int(options.shift) + j :].sum() for j in range(reached)])
    return rows if reached == k else torch.cat([rows, rows.new_zeros(k - reached)])


def counted_entries(
    labels: Tensor, position: Tensor, token: Tensor, options: LossOptions, classes: int | None = None
) -> Tensor:
    """``[B, n]`` bool: which hard tokens count.

    Args:
        labels: ``[B, T]`` int64.
        position, token: ``[B, n]`` int64.
        options: reads ignore_index, shift and vocab_range.
        classes: size of the vocabulary where there is no vocab_range; None: unknown, no upper limit.
    """
    if not labels.numel():
        return torch.zeros_like(position, dtype=torch.bool)
    time = labels.shape[1]
    target = labels.gather(1, position.clamp(0, time - 1))
    counts = (position >= int(options.shift)) & (position < time) & (target != options.ignore_index)
    low, high = options.vocab_range or (0, classes)
    counts &= (token != target) & (token >= low)
    return counts if high is None else counts & (token < high)


def shift_by_head(values: Tensor, k: int, fill: float, options: LossOptions) -> Tensor:
    """``[k, B, T]``: entry ``[j, b, t]`` is ``values[b, t + shift + j]``, `fill` beyond the end of the sequence."""
    shifted = values.new_full((k, *values.shape), fill)
    for j in range(k):
        offset = j + int(options.shift)
        if offset < values.shape[1]:
            shifted[j, :, : values.shape[1] - offset] = values[:, offset:]
    return shifted


def check_supervision(
    labels: Tensor, het: HardTokens | None, token_weights: Tensor | None, batch: int, time: int
) -> None:
    """Checks shapes and dtypes, and that all are on the device of `labels`.

    Raises:
        ValueError: one of them is not as `count_items` describes.
    """
    check_tensor("labels", labels, "integer", (batch, time))
    tensors = {"token_weights": token_weights}
    if token_weights is not None:
        check_tensor("token_weights", token_weights, "float", (batch, time))
    if het is not None:
        if not (hasattr(het, "position") and hasattr(het, "token")):
            raise ValueError(f"het must be a HardTokens, got {shown(het)}")
        check_tensor("het.position", het.position, "int64", (batch, "n"))
        check_tensor("het.token", het.token, "int64", tuple(het.position.shape))
        tensors |= {"het.position": het.position, "het.token": het.token}
    for name, tensor in tensors.items():
        if tensor is not None:
            check_device(name, tensor, "labels", labels.device)


def filled(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers as a tensor, made on the device: a copy from the host would synchronise, and fail in a CUDA graph."""
    return torch.stack([torch.full((), number, dtype=dtype, device=device) for number in numbers])
