"""Reading YAML files and ``key=value`` overrides that may hold anything, and values that stay out of saved files."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationValidationError

# Far above any configuration, far below what would take the parser minutes.
MAX_BYTES = 200_000
# Interpolations can refer to each other, and each can double what the last one gave: few keep the product small.
MAX_INTERPOLATIONS = 20
_KEY = re.compile(r"[\w-]+(\.[\w-]+)*")


def read_yaml(path: Path) -> DictConfig:
    """A YAML file's content.

    Raises:
        ValueError: it cannot be read, is no YAML, or is not a mapping of keys.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"configuration must be a readable file, got {path} ({error.strerror})") from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"configuration must have at most {MAX_BYTES} bytes, got {len(data)} in {path}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"configuration must be UTF-8 text, got {path} ({error.reason} at byte {error.start})"
        ) from error
    try:
        content = OmegaConf.load(io.StringIO(text))
    except Exception as error:  # PyYAML's and OmegaConf's own, and what constructors of numbers raise
        raise ValueError(f"configuration must be valid YAML, got {path}: {reason(error)}") from error
    if not isinstance(content, DictConfig):
        raise ValueError(f"configuration must be a mapping of keys to values, got a list in {path}")
    if not content:
        raise ValueError(f"configuration must hold at least one key, got none in {path}")
    return content


def parse_overrides(overrides: Iterable[str]) -> DictConfig:
    """The configuration that ``section.key=value`` pairs make.

    Raises:
        ValueError: one has no key or no value, or its value is no YAML.
    """
    content = OmegaConf.create()
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals or not _KEY.fullmatch(key):
            raise ValueError(f"overrides must have the form key=value, such as model.k=1, got {short(item)}")
        if not value.strip():
            raise ValueError(f"overrides must have a value (null for none), got {short(item)}")
        try:
            if len(item) > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES} characters")
            content.merge_with_dotlist([item])
        except Exception as error:  # as in `read_yaml`
            raise ValueError(
                f"overrides must have values that are valid YAML, got {short(item)}: {reason(error)}"
            ) from error
    return content


def check_interpolations(content: Container) -> dict[str, tuple[str, Any]]:
    """What every interpolation gives, by its dotted key: its own text, and the value.

    Raises:
        ValueError: there are more than `MAX_INTERPOLATIONS`, or one refers to a whole section or list.
        OmegaConfBaseException: one refers to nothing, to itself or to a resolver that refuses.
    """
    found = list(_interpolations(content))
    count = sum(raw.count("${") for _, raw, _, _ in found)
    if count > MAX_INTERPOLATIONS:
        raise ValueError(f"interpolations must be at most {MAX_INTERPOLATIONS}, got {count}")
    values = {}
    for name, raw, parent, key in found:
        try:
            value = parent[key]
        except InterpolationValidationError:
            # Its message holds the value, which may be a secret of the environment.
            raise ValueError(
                f"interpolations must give values of their key's kind, got {short(raw)} at {name}"
            ) from None
        if isinstance(value, Container):
            raise ValueError(f"interpolations must refer to single values, got {short(raw)} at {name}")
        if isinstance(value, str) and ("${" in value or len(value) > MAX_BYTES):
            raise ValueError(f"interpolations must give plain values, got {short(raw)} at {name}")
        values[name] = (raw, value)
    return values


def _interpolations(content: Any, prefix: str = "") -> Iterator[tuple[str, str, Any, Any]]:
    """Dotted key, text, container and key there of every value that refers to another or to the environment."""
    if content._is_none() or content._is_missing() or content._is_interpolation():
        return
    for key in range(len(content)) if isinstance(content, ListConfig) else list(content.keys()):
        node = content._get_node(key)  # plain access would resolve it
        if node is not None and node._is_interpolation():
            yield f"{prefix}{key}", str(node._value()), content, key
        elif isinstance(node, Container):
            yield from _interpolations(node, f"{prefix}{key}.")


def conceal(message: str, values: dict[str, tuple[str, Any]]) -> str:
    """A message without what resolvers such as ``oc.env`` gave: their own text stands in its place."""
    for raw, value in values.values():
        if ":" in raw and len(str(value)) > 2:
            message = message.replace(str(value), raw)
    return message


def reason(error: BaseException) -> str:
    """What an error says, on one line."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        return f"{error.problem or error.context}{place}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def short(item: str) -> str:
    """A text as it is shown in an error: quoted, on one line, of readable length."""
    return repr(item if len(item) <= 80 else f"{item[:77]}...")
