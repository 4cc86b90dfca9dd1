"""Checks of arguments that are one number or one name, with errors in one grammar: "X must be ..., got ..."."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any


def check_integer(name: str, value: Any, minimum: int) -> None:
    """Raise a `ValueError` unless `value` is an integer (not a bool) of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {value!r}")


def check_number(
    name: str,
    value: Any,
    minimum: float | None = None,
    maximum: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Raise a `ValueError` unless `value` is a finite number (not a bool) within its limits.

    Args:
        name: the argument, as the user knows it.
        value: its value.
        minimum, maximum: limits that `value` may reach.
        above, below: limits that `value` may not reach.
    """
    limits: tuple[tuple[str, float | None, Callable[[Any, Any], bool]], ...] = (
        (">=", minimum, operator.ge),
        (">", above, operator.gt),
        ("<=", maximum, operator.le),
        ("<", below, operator.lt),
    )
    # no math.isfinite: torch.compile cannot trace it, and options of the loss are checked in traced code too
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf
    if not number or any(limit is not None and not holds(value, limit) for _, limit, holds in limits):
        wanted = " and ".join(f"{sign} {limit:g}" for sign, limit, _ in limits if limit is not None)
        raise ValueError(f"{name} must be a number{wanted and ' '}{wanted}, got {value!r}")


def check_multiple(name: str, value: int, factor_name: str, factor: int) -> None:
    """Raise a `ValueError` unless `value` is a positive multiple of `factor`, which the user knows as `factor_name`."""
    if value < factor or value % factor:
        raise ValueError(f"{name} must be a multiple of {factor_name}, {factor}, got {value}")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise a `ValueError` unless `value` is one of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def one_line(error: BaseException) -> str:
    """The message of another library's error without its line breaks; its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
