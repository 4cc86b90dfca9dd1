"""What is wrong with a packed data set, in one line wherever it is found."""

from __future__ import annotations


class ShardError(ValueError):
    """A file of a packed data set is missing, cut off, changed or cannot be reached; the message names it and the cure.

    A worker of a data loader raises it again with the worker's whole traceback as its message; `str()` is the last line
    of that, which is ours.
    """

    def __str__(self) -> str:
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()


class MissingFile(ShardError):
    """A file is not there."""
