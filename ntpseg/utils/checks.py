"""Checks of arguments that are one number or one name, with errors in one grammar: "X must be ..., got ..."."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable
from typing import Any

INT64_MAX = 2**63 - 1
_LARGEST = sys.float_info.max  # an int may be larger than any float


def check_integer(name: str, value: Any, minimum: int, maximum: int = INT64_MAX) -> None:
    """Raise a `ValueError` unless `value` is an integer (not a bool) from `minimum` to `maximum`.

    Without a `maximum` it must fit into 64 bits, as what it is handed to is no Python.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < minimum or value > maximum:
        limit = f" and <= {maximum}" if whole and value > maximum else ""
        raise ValueError(f"{name} must be an integer >= {minimum}{limit}, got {brief(value)}")


def check_bool(name: str, value: Any) -> None:
    """Raise a `ValueError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {brief(value)}")


def brief(value: Any) -> str:
    """``repr(value)`` in one line of at most 80 characters: a message names a value, it does not print a matrix."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # it holds an integer of more than 4,300 digits
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


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
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST
    if not number or any(limit is not None and not holds(value, limit) for _, limit, holds in limits):
        wanted = " and ".join(f"{sign} {limit:g}" for sign, limit, _ in limits if limit is not None)
        raise ValueError(f"{name} must be a number{wanted and ' '}{wanted}, got {brief(value)}")


def check_multiple(name: str, value: int, factor_name: str, factor: int) -> None:
    """Raise a `ValueError` unless `value` is a positive multiple of `factor`, which the user knows as `factor_name`."""
    if value < factor or value % factor:
        raise ValueError(f"{name} must be a multiple of {factor_name}, {factor}, got {value}")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise a `ValueError` unless `value` is one of `choices`."""
    choices = tuple(choices)
    if isinstance(value, bool) or not any([isinstance(value, type(choice)) and value == choice for choice in choices]):
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {brief(value)}")


def one_line(error: BaseException) -> str:
    """The message of another library's error without its line breaks; its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
