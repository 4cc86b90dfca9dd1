"""A forked process has a value of its own, and its parent keeps the one it had."""

from __future__ import annotations

import multiprocessing
import os
import threading

from ntpseg.utils.per_process import PerProcess

made = PerProcess(lambda: [os.getpid()])


def _child() -> tuple[int, list[int], bool]:
    return os.getpid(), made.get(), made.get() is made.get()


def test_a_forked_process_makes_its_own() -> None:
    mine = made.get()
    assert made.get() is mine == [os.getpid()]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        child, theirs, kept = pool.apply(_child)
    assert theirs == [child] != mine and kept
    assert made.get() is mine


def test_threads_share_one() -> None:
    ready, found = threading.Barrier(8), []

    def make() -> object:
        ready.wait()  # all are inside at once
        return object()

    shared = PerProcess(make)
    threads = [threading.Thread(target=lambda: found.append(shared.get())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(map(id, found))) == 1
