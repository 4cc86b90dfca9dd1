"""The hard-token memory itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ntpseg.memory import state
from ntpseg.memory.exchange import exchange
from ntpseg.memory.tokens import HardTokens
from ntpseg.ops import record_errors

_LOCKS = 4096


class HardTokenMemory:
    """The up to n hardest errors of every sample, recorded in one epoch and served in the next.

    Args:
        num_samples: number of samples N in the data set; sample ids are 0 .. N-1.
        n: entries kept per sample and epoch.
        device: where the memory lives and where its inputs and outputs are; the CPU by default.
        key: content key of the data set, its order included (see `content_key`); a state with another key is refused.
        deviation: the kind of deviation that is recorded; kept with the state, since kinds cannot be compared.
        ignore_index: the label of unsupervised positions.

    Raises:
        ValueError: ``num_samples`` or ``n`` is less than 1.
    """

    def __init__(
        self,
        num_samples: int,
        n: int,
        device: torch.device | str | None = None,
        *,
        key: str | None = None,
        deviation: str = "margin",
        ignore_index: int = -100,
    ) -> None:
        for name, value in (("num_samples", num_samples), ("n", n)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.num_samples = num_samples
        self.n = n
        self.device = torch.device(device or "cpu")
        self.key = key
        self.deviation = deviation
        self.ignore_index = ignore_index
        self._rows = torch.zeros(2, num_samples, 3, n, dtype=torch.int32, device=self.device)
        self._stamp = torch.zeros(2, num_samples, dtype=torch.int32, device=self.device)
        self._control = torch.zeros(1 + _LOCKS, dtype=torch.int32, device=self.device)
        self._epoch = torch.ones((), dtype=torch.int64, device=self.device)

    @property
    def epoch(self) -> int:
        """The epoch being recorded, from 1 on. Reading it waits for the device."""
        return int(self._epoch)

    def record(self, sample_ids: Tensor, prediction: Tensor, labels: Tensor, deviation: Tensor) -> None:
        """Keep each sample's n hardest errors of this epoch.

        An error is a supervised position whose prediction differs from its label. Visits of one sample in one epoch
        are merged: a (position, token) pair counts once, with its larger deviation.

        Args:
            sample_ids: ``[B]`` int64.
            prediction: ``[B, T]`` int64, aligned with ``labels``; -1 where there is none (``NTPOutput.prediction``).
            labels: ``[B, T]`` int64, unshifted.
            deviation: ``[B, T]`` floating point, what ranks the errors (``NTPOutput.margin``); NaN counts as +inf.

        Raises:
            ValueError: shapes do not fit, or a sample id is out of range (seen here for ids on the CPU, by `advance`
                for ids on a GPU, where looking would mean waiting).
        """
        self._check_ids(sample_ids)
        shape = prediction.shape
        if len(shape) != 2 or shape[0] != sample_ids.shape[0]:
            raise ValueError(f"prediction is {list(shape)}; it must be [B, T] with B = {sample_ids.shape[0]}")
        for name, tensor in (("labels", labels), ("deviation", deviation)):
            if tensor.shape != shape:
                raise ValueError(f"{name} is {list(tensor.shape)}; it must be {list(shape)}, as prediction is")
        record_errors(
            self._rows,
            self._stamp,
            self._control,
            self._epoch,
            sample_ids.to(self.device, non_blocking=True),
            prediction.to(self.device),
            labels.to(self.device),
            deviation.detach().to(self.device),
            self.ignore_index,
        )

    def advance(self) -> None:
        """End the epoch: what was recorded becomes what is served, and recording starts afresh.

        Raises:
            ValueError: a sample id of this epoch was out of range.
        """
        skipped = int(self._control[0])
        if skipped:
            self._control[0] = 0
            raise ValueError(
                f"sample_ids held {skipped} ids outside [0, {self.num_samples}); they must index the data set"
            )
        self._epoch += 1

    def lookup(self, sample_ids: Tensor) -> HardTokens:
        """Return what was recorded for these samples in the previous epoch.

        Args:
            sample_ids: ``[B]`` int64.

        Returns:
            `HardTokens`, each ``[B, n]`` int64 on the memory's device, hardest first, -1 in empty slots; all empty in
            the first epoch and for samples that the previous epoch did not visit.

        Raises:
            ValueError: ``sample_ids`` is no vector of integers, or (on the CPU) an id is out of range.
        """
        self._check_ids(sample_ids)
        ids = sample_ids.to(self.device)
        served = self._epoch - 1
        known = (ids >= 0) & (ids < self.num_samples)
        row = (served % 2) * self.num_samples + torch.where(known, ids, 0)
        valid = known & (served > 0) & (self._stamp.view(-1)[row] == served)
        entry = self._rows.view(-1, 3, self.n)[row]
        entry = torch.where(valid.view(-1, 1, 1), entry, -1).long()
        return HardTokens(position=entry[:, 1], token=entry[:, 2])

    def sync(self, group: object | None = None) -> None:
        """Merge what the ranks of a process group recorded, so that each can serve what another saw.

        Call it on every rank at the end of an epoch, before or after `advance`; doing it twice changes nothing.
        Without an initialised process group, or in a group of one, it returns at once.

        Args:
            group: a ``torch.distributed`` process group; the default group if None.
        """
        exchange(self._rows, self._stamp, self._control, self.epoch, group)

    def state_dict(self) -> dict[str, object]:
        """Return the exact state as CPU tensors, numbers and strings; its size grows with the errors held."""
        return {
            "format": state.FORMAT,
            "version": state.VERSION,
            "num_samples": self.num_samples,
            "n": self.n,
            "key": self.key,
            "deviation": self.deviation,
            "epoch": self.epoch,
            "served": state.pack(self._rows, self._stamp, self.epoch - 1),
            "recording": state.pack(self._rows, self._stamp, self.epoch),
        }

    def load_state_dict(self, saved: dict[str, object]) -> None:
        """Restore what `state_dict` returned, on any device.

        Raises:
            ValueError: it is no such state, of a later version, of another number of samples or entries, of another
                data set (content key) or of another kind of deviation. The memory is unchanged then.
        """
        state.check(saved, num_samples=self.num_samples, n=self.n, key=self.key, deviation=self.deviation)
        epoch = int(saved["epoch"])  # type: ignore[call-overload]
        self._stamp.zero_()
        self._control.zero_()
        state.unpack(saved["served"], self._rows, self._stamp, epoch - 1)
        state.unpack(saved["recording"], self._rows, self._stamp, epoch)
        self._epoch.fill_(epoch)

    def _check_ids(self, sample_ids: Tensor) -> None:
        if sample_ids.dim() != 1 or sample_ids.dtype != torch.int64:
            raise ValueError(f"sample_ids is {sample_ids.dtype} {list(sample_ids.shape)}; it must be int64 and [B]")
        if sample_ids.device.type == "cpu" and sample_ids.numel():
            low, high = int(sample_ids.min()), int(sample_ids.max())
            if low < 0 or high >= self.num_samples:
                raise ValueError(
                    f"sample_ids spans {low} .. {high}; every id must be in [0, {self.num_samples}), the data set"
                )
