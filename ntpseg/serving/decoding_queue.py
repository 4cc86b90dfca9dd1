"""One decode at a time, a few waiting, and their events on the way to whoever asked."""

from __future__ import annotations

import asyncio
import logging
import threading
import traceback
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ntpseg.serving.refusal import Refused, user_line

Event = dict[str, Any]
logger = logging.getLogger("ntpseg.serving")


class Stopped(Exception):
    """Nobody waits for this result any more."""


class Job:
    """A decode that was asked for: an iterator over its events.

    Attributes:
        ahead: jobs that were before it when it was asked for.
    """

    def __init__(self, run: Callable[[Job], Event], loop: asyncio.AbstractEventLoop, ahead: int) -> None:
        self.ahead = ahead
        self._run, self._loop = run, loop
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._stop = threading.Event()

    def emit(self, event: Event) -> None:
        """Send an event; called in the decoding thread.

        Raises:
            Stopped: nobody waits for it.
        """
        if self._stop.is_set():
            raise Stopped
        self._put(event)

    def work(self) -> None:
        """Run the job in the decoding thread; its result is the last event."""
        try:
            if not self._stop.is_set():
                self._put({"event": "done", **self._run(self)})
        except Stopped:
            pass
        except ValueError as error:
            self._put({"event": "error", "message": user_line(error)})
        except Exception as error:
            log_failure(error)
            self._put({"event": "error", "message": "the server failed; its log says where"})
        finally:
            self._put(None)

    async def events(self) -> AsyncIterator[Event]:
        """The events as they happen; leaving early stops the job."""
        try:
            if self.ahead:
                yield {"event": "queued", "ahead": self.ahead}
            while (event := await self._events.get()) is not None:
                yield event
        finally:
            self._stop.set()

    def _put(self, event: Event | None) -> None:
        # The loop is closed when the server has ended meanwhile.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


class DecodingQueue:
    """Runs jobs one after the other in a thread of its own.

    Args:
        max_waiting: jobs that may wait while one runs.
    """

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ntpseg-decode")
        self._pending = 0
        self._lock = threading.Lock()

    def submit(self, run: Callable[[Job], Event]) -> Job:
        """Ask for a job; called in the event loop.

        Raises:
            Refused: too many wait already.
        """
        with self._lock:
            if self._pending > self.max_waiting:
                raise Refused(503, "the server is busy; try again in a moment", {"Retry-After": "5"})
            job = Job(run, asyncio.get_running_loop(), self._pending)
            self._pending += 1
        self._pool.submit(job.work).add_done_callback(self._finished)
        return job

    def _finished(self, _: Any) -> None:
        with self._lock:
            self._pending -= 1

    def close(self) -> None:
        """Take no more jobs; those that wait are dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def log_failure(error: BaseException) -> None:
    """Log the kind and the place of an error, not its words: they may hold what was in an upload."""
    if isinstance(error, CancelledError):
        return
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    logger.error("%s at %s", type(error).__name__, places)
