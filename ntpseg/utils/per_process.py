"""What a forked process must make for itself: open files, connections and locks."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class PerProcess(Generic[Value]):
    """A value that every process makes for itself; a forked one begins without its parent's.

    A copied file shares its position with the parent's, a copied connection its bytes, and a lock that another thread
    held at the fork is never released in the child.

    Args:
        make: called once in each process that asks, perhaps more often where several threads are the first to.
    """

    def __init__(self, make: Callable[[], Value]) -> None:
        self._make = make
        self._made: dict[int, Value] = {}

    def get(self) -> Value:
        """This process's value."""
        process = os.getpid()
        if process not in self._made:
            # Of several threads one wins, and its value is that of all.
            self._made.setdefault(process, self._make())
            for other in [key for key in self._made if key != process]:
                self._made.pop(other, None)
        return self._made[process]
