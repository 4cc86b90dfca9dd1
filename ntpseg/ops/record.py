"""Recording hard errors into the memory's rows: what the fused native op does, stated in plain PyTorch.

The memory is two integer tensors. ``rows`` is ``[2, N, 3, n]`` int32: two epochs' buffers, a row per sample and in it
the deviations (float32 bits), positions and tokens of its entries in ranking order, position -1 in empty slots.
``stamp`` is ``[2, N]`` int32: the epoch that a row was last written in; a row counts only if its stamp is the epoch
asked for, so that neither starting an epoch nor a fresh file needs a pass over the rows. Epoch e lives in buffer e % 2.

Entries are ranked by deviation, descending, then position, then token, and a (position, token) pair is held once, with
its larger deviation. That makes merging commutative and associative: the outcome depends neither on the order in which
a sample's visits arrive nor on how they were spread over ranks or thread blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ntpseg.ops.extension import usable
from ntpseg.ops.topn import native_serves, ordered_bits, plain_topn_errors, ready
from ntpseg.utils.tensor_checks import check_tensor, shown

_NONE = torch.iinfo(torch.int64).min
_NO_PAIR = torch.iinfo(torch.int64).max
_NO_DEVIATION = -0x00800000  # the bits of -inf as float32


def record_errors(
    rows: Tensor,
    stamp: Tensor,
    control: Tensor,
    epoch: Tensor,
    sample_ids: Tensor,
    prediction: Tensor,
    labels: Tensor,
    deviation: Tensor,
    ignore_index: int = -100,
) -> None:
    """Merge the hardest errors of a batch into the rows of its samples, in place.

    A position is an error where ``prediction >= 0``, ``labels != ignore_index`` and the two differ. A sample may occur
    more than once in the batch. Predictions are kept as int32: `ntpseg.memory.HardTokenMemory` refuses larger ones.

    Args:
        rows: ``[2, N, 3, n]`` int32, contiguous; see the module's page.
        stamp: ``[2, N]`` int32.
        control: ``[1 + L]`` int32, zero between calls but for the first number, which counts the sample ids that were
            out of range and skipped; the rest are the locks of the native op.
        epoch: scalar int64 tensor on the same device, at least 1 (a tensor, so that a captured graph follows it).
        sample_ids: ``[B]`` int64.
        prediction: ``[B, T]`` int64, the token predicted for each position, negative where there is none.
        labels: ``[B, T]`` int64.
        deviation: ``[B, T]`` floating point; NaN counts as +inf, as in `topn_errors`.
        ignore_index: the label of unsupervised positions.

    Raises:
        ValueError: a shape or dtype of the batch's tensors does not fit. Those of the memory are not checked.
    """
    check_record(sample_ids, prediction, labels, deviation)
    arguments = (rows, stamp, control, epoch, sample_ids, prediction, labels)
    if native_serves(rows.device.type, prediction.shape[1], rows.shape[3]):
        inputs = [x.contiguous() for x in arguments[4:]]
        torch.ops.ntpseg.record_errors(*arguments[:4], *inputs, ready(deviation), ignore_index)
    else:
        plain_record_errors(*arguments, deviation, ignore_index)


def check_record(sample_ids: Tensor, prediction: Tensor, labels: Tensor, deviation: Tensor) -> None:
    """Raise a `ValueError` unless the batch's tensors are as `record_errors` describes, T >= 1; reads no element."""
    check_tensor("sample_ids", sample_ids, "int64", ("B",))
    check_tensor("prediction", prediction, "int64", (sample_ids.shape[0], "T"))
    if not prediction.shape[1]:
        raise ValueError(f"prediction must have T >= 1 positions, got {shown(prediction)}")
    check_tensor("labels", labels, "int64", tuple(prediction.shape))
    check_tensor("deviation", deviation, "float", tuple(prediction.shape))


def plain_record_errors(
    rows: Tensor,
    stamp: Tensor,
    control: Tensor,
    epoch: Tensor,
    sample_ids: Tensor,
    prediction: Tensor,
    labels: Tensor,
    deviation: Tensor,
    ignore_index: int,
) -> None:
    """Do what `record_errors` does with PyTorch operators alone (any device, any size)."""
    is_error = (prediction >= 0) & (labels != ignore_index) & (prediction != labels)
    value, index = plain_topn_errors(deviation, is_error, rows.shape[3])
    entries = pack_entries(value, index, prediction)
    plain_merge_entries(rows, stamp, control, epoch, sample_ids, entries)


def merge_entries(
    rows: Tensor, stamp: Tensor, control: Tensor, epoch: Tensor, sample_ids: Tensor, entries: Tensor
) -> None:
    """Merge entries that were ranked already into the rows of ``epoch``, in place.

    Args:
        entries: ``[B, 3, m]`` int32, laid out and ranked as the memory's own rows are, without repeated pairs.

    The other arguments are those of `record_errors`.
    """
    if rows.device.type == "cpu" and usable("cpu"):
        torch.ops.ntpseg.merge_entries(rows, stamp, control, epoch, sample_ids.contiguous(), entries.contiguous())
    else:
        plain_merge_entries(rows, stamp, control, epoch, sample_ids, entries)


def pack_entries(value: Tensor, index: Tensor, prediction: Tensor) -> Tensor:
    """Return what `topn_errors` found as ``[B, 3, n]`` int32 entries: deviation bits, position, token."""
    token = prediction.gather(1, index.clamp(min=0).long()).int()
    return torch.stack([value.view(torch.int32), index, token.masked_fill(index < 0, -1)], dim=1)


def plain_merge_entries(
    rows: Tensor, stamp: Tensor, control: Tensor, epoch: Tensor, sample_ids: Tensor, entries: Tensor
) -> None:
    """Do what `merge_entries` does with PyTorch operators alone (any device); entries may be in any order."""
    samples = stamp.shape[1]
    known = (sample_ids >= 0) & (sample_ids < samples)
    control[:1] += (~known).sum().int()
    sample_ids, entries = sample_ids[known], entries[known]
    flat_rows, flat_stamp = rows.view(2 * samples, *rows.shape[2:]), stamp.view(-1)
    target = (epoch % 2) * samples + sample_ids
    # Visits of one sample within the batch must see each other: the i-th visits of all samples go together.
    order = target.argsort(stable=True)
    for chosen in _rounds(target[order]):
        batch = order[chosen]
        row = target[batch]
        held = flat_rows[row]
        fresh = (flat_stamp[row] != epoch).unsqueeze(1)
        held[:, 1].masked_fill_(fresh, -1)
        flat_rows[row] = _merge(torch.cat([held, entries[batch]], dim=2), rows.shape[3])
        flat_stamp[row] = epoch.int()


def _rounds(target: Tensor) -> list[Tensor]:
    """Split sorted keys into index sets in which no key repeats."""
    column = torch.arange(target.numel(), device=target.device)
    starts = torch.ones_like(target, dtype=torch.bool)
    starts[1:] = target[1:] != target[:-1]
    visit = column - torch.where(starts, column, 0).cummax(0).values if target.numel() else column
    return [(visit == i).nonzero().squeeze(1) for i in range(int(visit.max()) + 1 if target.numel() else 0)]


def _merge(entries: Tensor, n: int) -> Tensor:
    """Rank ``[R, 3, m]`` candidates, drop the lesser of equal pairs and return the best as ``[R, 3, n]``."""
    bits, position, token = entries.unbind(1)
    empty = position < 0
    key = ordered_bits(bits.contiguous().view(torch.float32)).masked_fill(empty, _NONE)
    pair = ((position.long() << 32) | token.long()).masked_fill(empty, _NO_PAIR)
    order = key.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, pair.gather(1, order).argsort(dim=1, stable=True))
    key, pair = key.gather(1, order), pair.gather(1, order)
    key[:, 1:].masked_fill_(pair[:, 1:] == pair[:, :-1], _NONE)
    key, rank = key.sort(dim=1, descending=True, stable=True)
    chosen = order.gather(1, rank).unsqueeze(1).expand(-1, 3, -1)
    blank = torch.tensor([_NO_DEVIATION, -1, -1], dtype=torch.int32, device=entries.device).view(1, 3, 1)
    return torch.where((key == _NONE).unsqueeze(1), blank, entries.gather(2, chosen))[:, :, :n]
