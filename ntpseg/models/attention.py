"""The choice of the attention implementation, and the errors about it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

ATTENTION_NAMES = ("sdpa", "causal_blocks", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")


def default_attention() -> str | None:
    """What is used where none is named: the quickest on a CPU, Hugging Face's own choice (None) elsewhere."""
    return None if torch.cuda.is_available() else "causal_blocks"


@contextmanager
def attention_errors(name: str | None) -> Iterator[None]:
    """Turn Hugging Face's errors about attention `name` into a `ValueError` that names the argument."""
    try:
        yield
    except ImportError as error:
        if name is None or name in ("sdpa", "eager"):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"attention must be one that can be used here, such as sdpa, got {name!r} ({reason})"
        ) from error
    except ValueError as error:
        if name is None or "attn_implementation" not in str(error):
            raise
        raise ValueError(f"attention must be one of {', '.join(ATTENTION_NAMES)}, got {name!r}") from error
