"""A flat record of plain values as one string, for an operator's schema.

JSON or ``repr`` would do, but torch.compile can follow neither where it holds a number as dynamic; ``float.hex`` it
can, and that is exact (for whole numbers up to 2**53).
"""

from __future__ import annotations

Value = None | bool | int | float | str | tuple[float, ...] | tuple[int, ...]


def pack(values: list[Value]) -> str:
    """One string for a list of None, booleans, numbers, short words and tuples of numbers."""
    return ";".join([_pack(value) for value in values])


def unpack(text: str) -> list[Value]:
    """The inverse of `pack`."""
    return [_unpack(item) for item in text.split(";")]


def _pack(value: Value) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return "'" + value
    if isinstance(value, tuple):
        return "(" + ",".join([_pack(item) for item in value])
    return ("i" if isinstance(value, int) else "f") + float(value).hex()


def _unpack(item: str) -> Value:
    if item in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[item]
    if item.startswith("'"):
        return item[1:]
    if item.startswith("("):
        return tuple(_unpack(part) for part in item[1:].split(","))  # type: ignore[return-value]
    number = float.fromhex(item[1:])
    return int(number) if item.startswith("i") else number
