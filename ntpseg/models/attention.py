"""The choice of the attention implementation: names, what each needs, and the errors about it."""

from __future__ import annotations

import importlib
import importlib.util
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

ATTENTION_NAMES = ("auto", "flash", "xformers", "sdpa", "eager", "causal_blocks", "flex")
# Hugging Face's name of each; `flash` is the third version on a Hopper GPU that has it.
_IMPLEMENTATIONS = {"flash": "flash_attention_2", "flex": "flex_attention"}
_FLASH_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn", "pip install flash-attn --no-build-isolation"),
    "flash_attention_3": (
        "flash_attn_interface",
        "FlashAttention 3",
        "build it from the folder hopper of github.com/Dao-AILab/flash-attention",
    ),
}
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AttentionUse:
    """What attention is to be computed, by which an implementation can or cannot run and is quicker or slower.

    Attributes:
        device, dtype: of queries, keys and values.
        batch, heads, length, width: B, H, T and D of queries ``[B, H, T, D]``; of packed rows B sequences of T tokens.
        kv_heads: heads of keys and values.
        prefix: the prompt is bidirectional, so that a mask is needed.
        training: with backward.
        dropout: of probabilities, in training.
        packing: length of packed rows; None: a row per sequence.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int
    heads: int
    length: int
    width: int
    kv_heads: int | None = None
    prefix: bool = False
    training: bool = True
    dropout: float = 0.0
    packing: int | None = None


def default_attention(device: torch.device | None = None) -> str | None:
    """What is used where none is named: the quickest on a CPU, Hugging Face's own choice (None) elsewhere.

    Args:
        device: where the model runs; by default a GPU where there is one.
    """
    cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
    return None if cuda else "causal_blocks"


def implementation(name: str, use: AttentionUse) -> str:
    """Hugging Face's name of attention `name`, any of `ATTENTION_NAMES` but auto or one that transformers knows.

    Raises:
        ValueError: there is none of that name, or it cannot run there; says what would have to be installed or set.
    """
    chosen = _IMPLEMENTATIONS.get(name, name)
    if chosen not in _known() and "/" not in chosen:
        raise ValueError(f"attention must be one of {', '.join(ATTENTION_NAMES)}, got {name!r}")
    if name == "flash" and obstacle("flash_attention_3", use) is None:
        chosen = "flash_attention_3"
    reason = obstacle(chosen, use)
    if reason is not None:
        usable = [known for known in ("causal_blocks", "sdpa") if known != name]
        raise ValueError(
            f"attention must be one that can be used here, such as {' or '.join(usable)}, got {name!r}: {reason}"
        )
    return chosen


def obstacle(name: str, use: AttentionUse) -> str | None:
    """Why an implementation (Hugging Face's name, or one of `ATTENTION_NAMES`) cannot run there; None where it can."""
    name = _IMPLEMENTATIONS.get(name, name)
    if name in _FLASH_PACKAGES:
        return _flash_obstacle(name, use)
    if name == "xformers":
        return _xformers_obstacle(use)
    if name == "flex_attention":
        if use.training and use.device.type == "cpu":
            return "flex attention has no backward on a CPU"
        if use.training and use.dropout:
            return f"flex attention has no dropout; set model.overrides.attention_dropout=0 instead of {use.dropout}"
    return None


def _flash_obstacle(name: str, use: AttentionUse) -> str | None:
    module, package, install = _FLASH_PACKAGES[name]
    if use.device.type != "cuda":
        return f"it needs an NVIDIA GPU, and the model runs on {use.device.type}"
    major, minor = torch.cuda.get_device_capability(use.device)
    if name == "flash_attention_3" and major != 9:
        return f"it needs a Hopper GPU (compute capability 9), and this one has {major}.{minor}; use flash"
    if major < 8:
        return f"it needs a GPU of compute capability 8.0 or more, and this one has {major}.{minor}"
    if use.prefix:
        return "it takes no mask, which model.prefix_lm=true needs"
    if use.dtype not in _HALF:
        return f"it computes in bfloat16 or float16, and this is {_shown(use.dtype)}; set training.bf16=true"
    if use.width > 256 or use.width % 8:
        return f"its heads have at most 256 features, a multiple of 8, and these have {use.width}"
    if name == "flash_attention_3" and use.training and use.dropout:
        return f"it has no dropout; set model.overrides.attention_dropout=0 instead of {use.dropout}"
    return _import_obstacle(module, package, install)


def _xformers_obstacle(use: AttentionUse) -> str | None:
    if use.device.type != "cuda":
        return f"it needs an NVIDIA GPU, and the model runs on {use.device.type}"
    if use.dtype not in (*_HALF, torch.float32):
        return f"it computes in bfloat16, float16 or float32, and this is {_shown(use.dtype)}"
    multiple = 8 if use.dtype in _HALF else 4
    if use.width > 256 or use.width % multiple:
        return f"its heads have at most 256 features, a multiple of {multiple}, and these have {use.width}"
    return _import_obstacle("xformers.ops", "xformers", "pip install xformers, the release for this torch")


def _import_obstacle(module: str, package: str, install: str) -> str | None:
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"{package} is not installed; {install}"
    try:
        importlib.import_module(module)
    except Exception as error:  # compiled for another torch or CUDA, such packages fail in ways of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"{package} cannot be imported ({reason}); {install}"
    return None


def _known() -> set[str]:
    """What transformers can be told, its own and what was registered with it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from ntpseg.models import causal_blocks, xformers_attention

    causal_blocks.register()
    xformers_attention.register()
    return {"eager", "flash_attention_2", "flash_attention_3", *ALL_ATTENTION_FUNCTIONS.valid_keys()}


def _shown(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
