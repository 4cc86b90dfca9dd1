"""A rank that stands still: found by a time limit, named with the place where it stands, and every rank ends.

Each rank counts what it has come past: steps, micro-batches, batches of an evaluation, checkpoints. A thread of it
looks at that count; where it has stood for the limit, the rank writes down its stacks and where it is. All ranks stand
soon after one of them does, so all write, and the one that has come least far is named. Files in RUN/logs carry all
this: the process group may be what stands.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ntpseg.utils.files import write_json

# "Temporary failure" of sysexits.h: what a launcher may start again.
HUNG = 75
# With several ranks: as long as the process groups of PyTorch wait by default.
DEFAULT_SECONDS = 1800.0
_GRACE = 10.0
_EVENTS = (
    "on_epoch_begin",
    "on_epoch_end",
    "on_step_begin",
    "on_substep_end",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_step_end",
    "on_prediction_step",
    "on_evaluate",
    "on_save",
    "on_log",
)


class HangWatch(TrainerCallback):
    """Ends the process with exit code `HUNG` once no rank gets any further; a context around training.

    A process that was stopped as a whole (a suspended job) is given the limit anew.

    Args:
        run: the run's folder, which all ranks see.
        seconds: without any progress; all of loading a batch, of a forward and a backward pass, of a checkpoint and of
            decoding masks for an evaluation must take less.
        rank, ranks: of this process, and how many there are.
    """

    def __init__(self, run: Path, seconds: float, rank: int = 0, ranks: int = 1) -> None:
        self.folder, self.seconds, self.rank, self.ranks = run / "logs", seconds, rank, ranks
        self._interval = min(1.0, seconds / 10)
        self._done, self._count, self._step, self._doing = threading.Event(), 0, 0, "the start"
        self._last = time.monotonic()
        self._main = threading.main_thread().ident
        self._thread: threading.Thread | None = None
        self._stacks: IO[str] | None = None
        for event in _EVENTS:
            setattr(self, event, self._come_past(event.removeprefix("on_").replace("_", " ")))

    def _come_past(self, what: str) -> Any:
        def beat(args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            self._count, self._step, self._doing, self._last = (
                self._count + 1,
                state.global_step,
                what,
                time.monotonic(),
            )

        return beat

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start to watch."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for kind in ("hang", "heartbeat"):
            self._file(kind).unlink(missing_ok=True)
        if self.ranks > 1:
            # Nobody may take what an earlier life of another rank has left for a sign of this one.
            dist.barrier()
        self._step, self._last, self._main = state.global_step, time.monotonic(), threading.get_ident()
        self._done.clear()
        self._stacks = (self.folder / f"hang-rank-{self.rank}.txt").open("w", encoding="utf-8")
        self._thread = threading.Thread(target=self._watch, name="ntpseg-hang-watch", daemon=True)
        self._thread.start()

    def __enter__(self) -> HangWatch:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop, whatever ended training; without a hang nothing is left."""
        if self._thread is None:
            return
        self._done.set()
        self._thread.join()
        self._thread = None
        assert self._stacks is not None
        self._stacks.close()
        for path in (Path(self._stacks.name), self._file("heartbeat")):
            path.unlink(missing_ok=True)

    def _file(self, kind: str, rank: int | None = None) -> Path:
        return self.folder / f"{kind}-rank-{self.rank if rank is None else rank}.json"

    def _watch(self) -> None:
        assert self._stacks is not None
        woke = written = time.monotonic()
        self._write("heartbeat")
        while not self._done.wait(self._interval):
            now = time.monotonic()
            if now - woke > max(5.0, self.seconds / 2):
                self._last = now
            woke = now
            # Native code that never lets go of the interpreter stops this thread too, but not the one that dumps.
            faulthandler.dump_traceback_later(self.seconds + _GRACE, file=self._stacks)
            if now - written > min(30.0, self.seconds / 4):
                written = now
                self._write("heartbeat")
            if self._ranks_with("hang") - {self.rank} or now - self._last >= self.seconds:
                self._end()
        faulthandler.cancel_dump_traceback_later()

    def _end(self) -> None:
        assert self._stacks is not None
        faulthandler.cancel_dump_traceback_later()
        faulthandler.dump_traceback(file=self._stacks)
        own = self._write("hang")
        deadline = time.monotonic() + min(_GRACE, max(self.seconds, 2.0))
        while len(self._ranks_with("hang")) < self.ranks and time.monotonic() < deadline:
            time.sleep(self._interval)
        reports = self._reports("hang") | {self.rank: own}
        if self.rank == min(reports):
            print(self._message(reports), file=sys.stderr, flush=True)
        os._exit(HUNG)

    def _message(self, reports: dict[int, dict[str, Any]]) -> str:
        silent = sorted(set(range(self.ranks)) - set(reports))
        ends = f"all ranks end with exit code {HUNG}; stacks are in {self.folder}/hang-rank-*.txt"
        if silent:
            known = self._reports("heartbeat").get(silent[0], {})
            more = f" (and {len(silent) - 1} more)" if len(silent) > 1 else ""
            return (
                f"ntpseg: rank {silent[0]}{more} on {known.get('host', 'an unknown host')} gives no sign, its process "
                f"{known.get('pid', '')} is stopped, gone or in native code; it was last seen after step "
                f"{known.get('step', 0)}; the others have waited for {self.seconds:g} s; {ends}"
            )
        rank, report = min(reports.items(), key=lambda item: _rank_of(item[1]))
        return (
            f"ntpseg: rank {rank} on {report['host']} has stood still for {report['idle']:.0f} s after step "
            f"{report['step']}, past {report['doing']!r}, in {report['where']}; {ends}"
        )

    def _ranks_with(self, kind: str) -> set[int]:
        """Whose files there are: one listing, where hundreds of ranks would look for hundreds of files every second."""
        try:
            names = os.listdir(self.folder)
        except OSError:
            return set()
        found = (re.fullmatch(rf"{kind}-rank-(\d+)\.json", name) for name in names)
        return {int(match[1]) for match in found if match} & set(range(self.ranks))

    def _reports(self, kind: str) -> dict[int, dict[str, Any]]:
        found = {}
        for rank in sorted(self._ranks_with(kind)):
            # One that is just being written counts as none.
            with suppress(OSError, ValueError):
                found[rank] = json.loads(self._file(kind, rank).read_text(encoding="utf-8"))
        return found

    def _write(self, kind: str) -> dict[str, Any]:
        where, waiting = _place(sys._current_frames().get(self._main or 0))
        report = {
            "rank": self.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": self._step,
            "count": self._count,
            "doing": self._doing,
            "idle": time.monotonic() - self._last,
            "where": where,
            "waiting": waiting,
        }
        # A full disk must not end the watch.
        with suppress(OSError):
            write_json(self._file(kind), report)
        return report


def _rank_of(report: dict[str, Any]) -> tuple[Any, ...]:
    """Which of several standing ranks comes first: the one that has come past least, and waits for no other."""
    return report["count"], report["waiting"], -report["idle"]


def _place(frame: FrameType | None) -> tuple[str, int]:
    """Where a thread is, and whether it waits for other ranks there: 0 no, 1 perhaps (a backward pass), 2 yes."""
    if frame is None:
        return "an unknown place", 0
    inner, waiting = f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})", 0
    outer: FrameType | None = frame
    while outer is not None:
        path = outer.f_code.co_filename.replace(os.sep, "/")
        if "/torch/distributed/" in path or "/deepspeed/comm/" in path:
            waiting = 2
        elif path.endswith("/torch/autograd/graph.py"):
            waiting = max(waiting, 1)
        if not any(part in path for part in ("/site-packages/", "/lib/python")):
            break
        outer = outer.f_back
    if outer is None or outer is frame:
        return inner, waiting
    return (
        f"{inner}, called from {outer.f_code.co_name} ({Path(outer.f_code.co_filename).name}:{outer.f_lineno})",
        waiting,
    )


def watch_seconds(configured: float | None, ranks: int) -> float:
    """The limit of a run: ``training.hang_timeout``, by default only with several ranks; 0: no watch."""
    if configured is None:
        return DEFAULT_SECONDS if ranks > 1 else 0.0
    return configured
