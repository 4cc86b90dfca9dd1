"""Errors about one argument say what it must be and what it was."""

from __future__ import annotations

import pytest

from ntpseg.utils.checks import check_choice, check_integer, check_multiple, check_number


@pytest.mark.parametrize("value", [0, True, 1.0, "1", None])
def test_integers(value: object) -> None:
    check_integer("size", 1, 1)
    with pytest.raises(ValueError, match=rf"^size must be an integer >= 1, got {value!r}$"):
        check_integer("size", value, 1)


@pytest.mark.parametrize(
    ("value", "limits", "message"),
    [
        (-0.1, {"minimum": 0}, "rate must be a number >= 0, got -0.1"),
        (0, {"above": 0, "maximum": 1}, "rate must be a number > 0 and <= 1, got 0"),
        (1.5, {"minimum": 0, "below": 1.5}, "rate must be a number >= 0 and < 1.5, got 1.5"),
        (float("nan"), {}, "rate must be a number, got nan"),
        (True, {"minimum": 0}, "rate must be a number >= 0, got True"),
        ("1", {}, "rate must be a number, got '1'"),
    ],
)
def test_numbers(value: object, limits: dict[str, float], message: str) -> None:
    check_number("rate", 0.5, **limits)
    with pytest.raises(ValueError) as refused:
        check_number("rate", value, **limits)
    assert str(refused.value) == message


def test_multiples() -> None:
    check_multiple("size", 16, "factor", 8)
    for value in (0, 4, 12):
        with pytest.raises(ValueError, match=rf"^size must be a multiple of factor, 8, got {value}$"):
            check_multiple("size", value, "factor", 8)


def test_choices() -> None:
    check_choice("channels", 3, (1, 3))
    with pytest.raises(ValueError, match=r"^channels must be one of 1, 3, got 2$"):
        check_choice("channels", 2, (1, 3))
    with pytest.raises(ValueError, match=r"^method must be one of greedy, beam, got 'best'$"):
        check_choice("method", "best", {"greedy": 1, "beam": 2})
