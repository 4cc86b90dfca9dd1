"""What a reader of weights found missing or superfluous: refused, or told where that is expected."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def check_report(path: Path, report: dict[str, Any], optional: tuple[str, ...]) -> None:
    """Refuse a model whose weights are not those that its configuration has, see `load_whole`.

    Args:
        path: its directory.
        report: names by ``missing_keys``, ``unexpected_keys`` and ``mismatched_keys``.
        optional: beginnings of names of weights that may be missing or superfluous.

    Raises:
        ValueError: another weight is missing or superfluous, or one has another shape.
    """
    for key, reason in (("missing_keys", "without"), ("unexpected_keys", "with"), ("mismatched_keys", "with another")):
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in report[key])
        tolerated = [name for name in names if name.startswith(optional) and key != "mismatched_keys"]
        if tolerated:
            print(f"{path} is {reason} {_first(tolerated)}: what the model lacks starts at random", file=sys.stderr)
        wrong = [name for name in names if name not in tolerated]
        if wrong:
            raise ValueError(
                "model directory must hold the weights of the configuration and no others, "
                f"got {str(path)!r} {reason} {_first(wrong)}"
            )


def _first(names: list[str]) -> str:
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
