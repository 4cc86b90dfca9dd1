"""`Refused`: a request that is answered with a status and one line."""

from __future__ import annotations

import re
from pathlib import Path


class Refused(Exception):
    """A request that is not served.

    Args:
        status: HTTP status.
        message: one line for the user; it names no path.
        headers: of the answer.
        series: what to choose from, where that is what is missing: names and descriptions.
    """

    def __init__(
        self,
        status: int,
        message: str,
        headers: dict[str, str] | None = None,
        series: list[tuple[str, str]] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}
        self.series = series


def user_line(error: Exception, folder: Path | None = None) -> str:
    """What an error about an upload says, in one line, without the files of `folder` where the upload lay."""
    text = " ".join(str(error).split()) or type(error).__name__
    if folder is not None:
        text = re.sub(re.escape(str(folder)) + r"[\w./-]*", "the upload", text)
    return text[:500]
