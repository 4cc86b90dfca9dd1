"""The hard-token memory itself, and what it serves to the loss."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ntpseg.memory import deviation as deviations
from ntpseg.memory import snapshot, state, storage
from ntpseg.memory.arguments import MAX_TOKEN, check_largest, check_options, check_real, usable_device
from ntpseg.memory.background import Background, served_rows
from ntpseg.memory.changes import mark_merged, mark_recorded
from ntpseg.memory.exchange import Traffic, exchange
from ntpseg.memory.overlap import Overlap
from ntpseg.ops import merge_entries, record_errors, topn_errors
from ntpseg.ops.record import check_record, pack_entries
from ntpseg.utils.tensor_checks import check_tensor, readable

_LOCKS = 4096


@dataclass(frozen=True)
class HardTokens:
    """Hard error tokens of a batch.

    Attributes:
        position: ``[B, n]`` int64, the token position p in the sequence; -1 marks an empty slot.
        token: ``[B, n]`` int64, the wrong token that was predicted there; -1 marks an empty slot.
    """

    position: Tensor
    token: Tensor


class HardTokenMemory:
    """The up to n hardest errors of every sample, recorded in one epoch and served in the next.

    It takes ``(24 n + 10) N`` bytes: two epochs of deviation, position and token, and of each row its stamp and flags.
    In each step `lookup` what the loss is to read, then `observe` its output (which works out the deviation of the
    memory's kind) or `record` a deviation of your own; at the end of the epoch `sync` ranks and `advance`.

    Args:
        num_samples: number of samples N in the data set; sample ids are 0 .. N-1.
        n: entries kept per sample and epoch.
        device: where the inputs of `record` and the outputs of `lookup` are; the CPU by default.
        storage: where the rows lie. ``device``: beside the model; nothing waits, and on CUDA `record` can be captured
            into a graph. ``pinned``: in host memory; ``mapped``: in files under ``path``, for data sets beyond memory.
            Both of these work in the background: `record` passes its entries to a thread, and `prefetch` fetches the
            next batch's while this one computes.
        path: folder of a mapped memory. One that is there already is opened where it left off.
        key: content key of the data set, its order included (see `content_key`); a state with another key is refused.
        deviation: the kind of deviation that ranks errors, one of `ntpseg.memory.deviation.KINDS`: what `observe`
            works out, and what `record` must be given. Kept with the state, since kinds cannot be compared.
        ignore_index: the label of unsupervised positions.

    Attributes:
        traffic: what exchanges between ranks cost so far (`ntpseg.memory.Traffic`).

    Raises:
        ValueError: an argument is out of range or unknown, or the files under ``path`` belong to another memory.
    """

    def __init__(
        self,
        num_samples: int,
        n: int,
        device: torch.device | str | None = None,
        *,
        storage: str = "device",
        path: str | Path | None = None,
        key: str | None = None,
        deviation: str = "margin",
        ignore_index: int = -100,
    ) -> None:
        check_options(num_samples, n, storage, path, deviation, ignore_index)
        self.num_samples, self.n = num_samples, n
        self.device = usable_device(device)
        self.storage, self.key, self.deviation, self.ignore_index = storage, key, deviation, ignore_index
        home = self.device if storage == "device" else torch.device("cpu")
        self._control = torch.zeros(1 + _LOCKS, dtype=torch.int32, device=home)
        self._epoch = torch.ones((), dtype=torch.int64, device=home)
        self._largest_token = torch.zeros((), dtype=torch.int64, device=self.device)
        self._store = self._open(home, path)
        self._background: Background | None = None
        if storage != "device":
            self._background = Background(self._store, self._control, self._epoch, self.device)
        self.traffic = Traffic()
        self._overlap = Overlap(self._store, self._control, self._background, self.traffic)
        self._snapshots = snapshot.Snapshots(self._store)

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
            prediction: ``[B, T]`` int64 below 2**31, aligned with ``labels``; -1 where there is none
                (``NTPOutput.prediction``). T >= 1, while B may be 0.
            labels: ``[B, T]`` int64, unshifted.
            deviation: ``[B, T]`` floating point, what ranks the errors (``NTPOutput.margin``); NaN counts as +inf.

        Raises:
            ValueError: a type, shape or dtype does not fit, or a sample id or a prediction is out of range (seen here
                for tensors on the CPU, by `advance` for those on a GPU, where looking would mean waiting).
        """
        self._check_ids(sample_ids)
        check_record(sample_ids, prediction, labels, deviation)
        for name, tensor in (("prediction", prediction), ("labels", labels), ("deviation", deviation)):
            check_real(name, tensor)
        if readable(prediction):
            if prediction.numel():
                check_largest(int(prediction.amax()))
        elif prediction.numel():
            torch.maximum(self._largest_token, prediction.amax().to(self.device), out=self._largest_token)
        inputs = (self._here(x.detach()) for x in (sample_ids, prediction, labels, deviation))
        sample_ids, prediction, labels, deviation = inputs
        if self._background is None:
            mark_recorded(self._store, self._epoch, sample_ids)
            memory = (self._store.rows, self._store.stamp, self._control, self._epoch)
            record_errors(*memory, sample_ids, prediction, labels, deviation, self.ignore_index)
            return
        is_error = (prediction >= 0) & (labels != self.ignore_index) & (prediction != labels)
        value, index = topn_errors(deviation, is_error, self.n)
        self._background.write(sample_ids.clone(), pack_entries(value, index, prediction))

    def observe(
        self,
        sample_ids: Tensor,
        output: deviations.TokenOutput,
        labels: Tensor,
        codebook: deviations.Codebook | None = None,
    ) -> None:
        """Record a loss's output, ranked by this memory's own kind of deviation (`ntpseg.memory.token_deviation`).

        Args:
            sample_ids: ``[B]`` int64.
            output: what `ntpseg.ntp_loss` returned; its ``prediction``, ``nll`` and ``margin`` are read.
            labels: ``[B, T]`` int64, unshifted.
            codebook: the embeddings, for deviation ``codebook`` alone.

        Raises:
            ValueError: as `record`, or ``codebook`` is missing.
        """
        deviation = deviations.token_deviation(self.deviation, output, labels, codebook)
        self.record(sample_ids, output.prediction, labels, deviation)

    def advance(self) -> None:
        """End the epoch: what was recorded becomes what is served, and recording starts afresh.

        Takes the same time whatever the size of the memory.

        Raises:
            ValueError: a sample id or a prediction of this epoch was out of range.
        """
        self._settle()
        largest = int(self._largest_token)
        if largest > MAX_TOKEN:
            self._largest_token.zero_()
            check_largest(largest)
        skipped = int(self._control[0])
        if skipped:
            self._control[0] = 0
            raise ValueError(f"sample_ids must be in [0, {self.num_samples}), the data set, got {skipped} ids outside")
        self._epoch += 1
        self._write_header()

    def prefetch(self, sample_ids: Tensor) -> None:
        """Start fetching what a later `lookup` of the same ids will return; up to eight batches ahead.

        Does nothing where the rows are on the device already.

        Args:
            sample_ids: ``[B]`` int64; ids on a GPU have to be waited for.
        """
        self._check_ids(sample_ids)
        if self._background is not None:
            self._background.prefetch(sample_ids)

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
        if self._background is not None:
            entries = self._background.read(sample_ids)
        else:
            entries = served_rows(self._store, self._epoch, self._here(sample_ids))
        return HardTokens(position=entries[:, 1].long(), token=entries[:, 2].long())

    def sync(self, group: Any = None, *, async_op: bool = False) -> None:
        """Merge what the ranks of a process group recorded, so that each can serve what another saw.

        Call it on every rank at the end of an epoch, before or after `advance`; doing it twice changes nothing.
        Without an initialised process group, or in a group of one, it returns at once. Only rows that were recorded
        since the last time travel; `traffic` counts them.

        Args:
            group: a ``torch.distributed`` process group; the default group if None.
            async_op: send what this epoch has recorded so far, in the background, and return. Nothing need wait for
                it: what was sent is not sent again at the end of the epoch, and is read in the next one. Every rank
                must call it after the same step.

        Raises:
            ValueError: the ranks are in different epochs (of an exchange in the background, the next call that waits
                for it says so).
        """
        if async_op:
            self._overlap.begin(self.epoch, group)
            return
        self._settle()
        start = time.perf_counter()
        exchange(self._store, self._control, self.epoch, group, self.traffic)
        self.traffic.seconds_waited += time.perf_counter() - start

    def wait(self) -> None:
        """Finish what is under way: writes, and an exchange in the background."""
        self._settle()

    def flush(self) -> None:
        """Finish what is under way; of a mapped memory, wait until the disk has it. A killed process loses nothing
        for which `record` has returned; after a power cut, what was flushed is there."""
        self._settle()
        self._store.flush()

    def state_dict(self) -> dict[str, Any]:
        """Return the exact state as CPU tensors, numbers and strings; its size grows with the errors held.

        See `save` for a memory that is larger than the host's.
        """
        self._settle()
        rows, stamp, epoch = self._store.rows, self._store.stamp, self.epoch
        return {
            **self._identity(),
            "served": state.pack(rows, stamp, epoch - 1),
            "recording": state.pack(rows, stamp, epoch),
        }

    def load_state_dict(
        self, saved: dict[str, Any], *, vocab_size: int | None = None, length: int | None = None
    ) -> None:
        """Restore what `state_dict` returned, whatever storage and device it came from.

        Args:
            saved: the state.
            vocab_size: tokens must be below it, where it is given.
            length: positions must be below it, where it is given.

        Raises:
            ValueError: it is no such state, of another version, of another number of samples or entries, of another
                data set (content key), of another kind of deviation, or holds what no memory can hold: samples, counts,
                positions or tokens out of range. The memory is unchanged then.
        """
        epoch = self._check_state(saved, vocab_size, length)
        self._settle()
        store = self._store
        store.clear()
        self._control.zero_()
        self._largest_token.zero_()
        # What was saved so far is of the state that goes; new ones write all first, whatever is flagged.
        self._snapshots = snapshot.Snapshots(store)
        state.unpack(saved["served"], store.rows, store.stamp, epoch - 1)
        state.unpack(saved["recording"], store.rows, store.stamp, epoch)
        store.strange = True
        self._epoch.fill_(epoch)
        self._write_header()

    def merge_state_dict(
        self, saved: dict[str, Any], *, vocab_size: int | None = None, length: int | None = None
    ) -> None:
        """Add what another rank's `state_dict` holds, as `sync` does between ranks that are there.

        Args:
            saved, vocab_size, length: as in `load_state_dict`.

        Raises:
            ValueError: as `load_state_dict`, or the state is of another epoch. The memory is unchanged then.
        """
        epoch = self._check_state(saved, vocab_size, length)
        if epoch != self.epoch:
            raise ValueError(f"the state's epoch must be {self.epoch} as in this memory, got {epoch}")
        self._settle()
        store = self._store
        for name, current in (("served", epoch - 1), ("recording", epoch)):
            stamp = torch.tensor(current, device=store.rows.device)
            for sample, block in state.blocks(saved[name], self.n):
                target, entries = sample.to(store.rows.device), block.contiguous().to(store.rows.device)
                mark_merged(store, stamp, target)
                merge_entries(store.rows, store.stamp, self._control, stamp, target, entries)
                store.touch(target.numel(), written=True)
        store.strange = True

    def save(self, path: str | Path) -> None:
        """Write the state to a file, of a mapped memory as what changed since it was last saved, in bounded memory.

        Besides ``path`` a mapped memory has files ``STEM-*.pt`` there. Those of an earlier `save` that still hold are
        linked, not copied, from the folder that it wrote to, if that is still there; else all is written.

        Args:
            path: file to write; it appears when everything else is there.
        """
        self._settle()
        if self.storage == "mapped":
            self._snapshots.save(Path(path), self._identity())
        else:
            snapshot.write(Path(path), self.state_dict())

    def load(self, path: str | Path, **limits: int | None) -> None:
        """Restore what `save` wrote, whatever kind of memory did.

        Args:
            path: the file.
            **limits: ``vocab_size`` and ``length``, as in `load_state_dict`.

        Raises:
            ValueError: as `load_state_dict`, or the file or one of those beside it cannot be read.
        """
        self._take(path, self.load_state_dict, limits)

    def merge(self, path: str | Path, **limits: int | None) -> None:
        """Add what another rank's `save` wrote; arguments and errors as in `load`."""
        self._take(path, self.merge_state_dict, limits)

    def _here(self, tensor: Tensor) -> Tensor:
        """On the memory's device. Only a copy to a GPU may be in flight: one to the CPU is read at once."""
        return tensor.to(self.device, non_blocking=self.device.type != "cpu")

    def _take(self, path: str | Path, take: Callable[..., None], limits: dict[str, int | None]) -> None:
        # All parts before the first is taken: a damaged one leaves this memory as it was.
        for saved in snapshot.states(Path(path)):
            self._check_state(saved, limits.get("vocab_size"), limits.get("length"))
        for saved in snapshot.states(Path(path)):
            take(saved, **limits)
            take = self.merge_state_dict

    def _check_state(self, saved: dict[str, Any], vocab_size: int | None, length: int | None) -> int:
        state.check(saved, self._identity())
        epoch = state.check_epoch(saved["epoch"])
        for name in ("served", "recording"):
            state.check_entries(name, saved.get(name), self.num_samples, self.n, vocab_size=vocab_size, length=length)
        if epoch == 1 and saved["served"]["sample"].numel():
            raise ValueError("the state's served must be empty in epoch 1, got entries")
        return epoch

    def _open(self, home: torch.device, path: str | Path | None) -> storage.Storage:
        if self.storage != "mapped":
            return storage.in_memory(self.num_samples, self.n, home, pinned=self.storage == "pinned")
        folder = Path(path or "")
        header = storage.read_header(folder)
        if header is not None:
            state.check(header, self._identity())
            self._epoch.fill_(state.check_epoch(header["epoch"]))
        opened = storage.mapped(folder, self.num_samples, self.n, new=header is None)
        lowest, highest = (int(x) for x in opened.stamp.view(-1).aminmax()) if header is not None else (0, 0)
        opened.release()
        if not 0 <= lowest <= highest <= self.epoch:
            raise ValueError(f"{folder / 'stamp'} must hold epochs up to {self.epoch}, got others; remove {folder}")
        if header is None:
            storage.write_header(folder, self._identity())
        return opened

    def _identity(self) -> dict[str, Any]:
        return {
            "format": state.FORMAT,
            "version": state.VERSION,
            "num_samples": self.num_samples,
            "n": self.n,
            "key": self.key,
            "deviation": self.deviation,
            "epoch": self.epoch,
        }

    def _settle(self) -> None:
        self._overlap.finish()
        if self._background is not None:
            self._background.drain()

    def _write_header(self) -> None:
        if self._store.folder is not None:
            storage.write_header(self._store.folder, self._identity())

    def _check_ids(self, sample_ids: Tensor) -> None:
        check_tensor("sample_ids", sample_ids, "int64", ("B",))
        check_real("sample_ids", sample_ids)
        if sample_ids.device.type == "cpu" and sample_ids.numel():
            low, high = int(sample_ids.min()), int(sample_ids.max())
            if low < 0 or high >= self.num_samples:
                raise ValueError(f"sample_ids must be in [0, {self.num_samples}), the data set, got {low} .. {high}")
