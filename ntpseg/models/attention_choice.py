"""``attention: auto``: what can run here is measured once for a device, dtype and class of shapes, and remembered.

The choice is kept in the process and in ``attention.json`` of the user's cache folder. Nothing is measured where tests
run (`PYTEST_CURRENT_TEST` or `CI` is set) unless ``NTPSEG_MEASURE_ATTENTION=1`` asks for it; ``0`` forbids it anywhere.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ntpseg.models.attention import AttentionUse, default_attention, implementation, obstacle
from ntpseg.models.packing import PackedRows, packed_arguments
from ntpseg.utils.tuning_cache import cache_file, read_choice, save_choice

MEASURE = "NTPSEG_MEASURE_ATTENTION"
# Of those that are about as quick the first is taken: eager and causal_blocks keep their probabilities for backward.
CANDIDATES = ("flash", "sdpa", "xformers", "causal_blocks", "flex", "eager")
_AS_QUICK = 1.03
# More scores than this in float32 are measured at a smaller batch; bytes.
_MOST_SCORES = {"cpu": 2**28, "cuda": 2**33}
_ROUNDS, _SECONDS = 7, 3.0
_known: dict[tuple[str, str, str], AttentionChoice] = {}


@dataclass(frozen=True)
class AttentionChoice:
    """What was chosen and why.

    Attributes:
        attention: one of `ATTENTION_NAMES`, or a name that was asked for; None: Hugging Face's default.
        implementation: Hugging Face's name; None: its default.
        source: ``configured``, ``default``, ``measured`` or ``remembered``.
        milliseconds: of those that were measured, of one call at the measured shape.
        left_out: of the others, why.
    """

    attention: str | None
    implementation: str | None
    source: str
    milliseconds: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


def choose_attention(name: str | None, use: AttentionUse, *, agree: bool = True) -> AttentionChoice:
    """The implementation for `name`.

    Args:
        name: what the configuration says; None: the default without measuring.
        use: where and for what.
        agree: for auto, every rank of a process group calls this alike and gets rank 0's choice; False: each its own.

    Raises:
        ValueError: the name is unknown or cannot run there.
    """
    if name is None:
        default = default_attention(use.device)
        return AttentionChoice(default, default, "default")
    if name != "auto":
        return AttentionChoice(name, implementation(name, use), "configured")
    if not agree or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return quickest(use)
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [quickest(use)]
        except Exception as error:  # the other ranks wait for an answer
            found = [error]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], Exception):
        raise found[0]
    assert isinstance(found[0], AttentionChoice)
    return found[0]


def quickest(use: AttentionUse) -> AttentionChoice:
    """The quickest of `CANDIDATES` for that use, remembered or measured; the default where neither may be."""
    case, path = case_of(use), cache_file("attention.json")
    place = (device_name(use.device), f"torch {torch.__version__}", case)
    made = _known.get(place)
    if made is None and _may_remember():
        entry = read_choice(path, *place)
        if entry is not None and entry.get("attention") in CANDIDATES:
            times = entry.get("milliseconds")
            made = AttentionChoice(entry["attention"], "", "remembered", times if isinstance(times, dict) else {})
    if made is not None and obstacle(str(made.attention), use) is None:
        return replace(made, implementation=implementation(str(made.attention), use), source="remembered")
    if not _may_measure():
        default = default_attention(use.device) or "sdpa"
        return AttentionChoice(default, implementation(default, use), "default")
    milliseconds, left_out = measure(use)
    least = min(milliseconds.values())
    best = next(name for name in CANDIDATES if milliseconds.get(name, float("inf")) <= _AS_QUICK * least)
    made = AttentionChoice(best, implementation(best, use), "measured", milliseconds, left_out)
    _known[place] = made
    save_choice(path, *place, {"attention": best, "milliseconds": milliseconds, "left_out": left_out})
    return made


def case_of(use: AttentionUse) -> str:
    """The class of shapes: batch times heads and length up to powers of two, all else as it is."""
    parts = [
        str(use.dtype).removeprefix("torch."),
        f"heads {_power(use.batch * use.heads)}",
        f"length {_power(use.length)}",
        f"width {use.width}",
        f"groups {use.heads // (use.kv_heads or use.heads)}",
        "prefix" if use.prefix else "causal",
        "training" if use.training else "inference",
    ]
    if use.dropout and use.training:
        parts.append("dropout")
    if use.packing:
        parts.append(f"packed {_power(use.packing)}")
    return ", ".join(parts)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with the number of threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def measure(use: AttentionUse) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds of one call (with backward in training) of each candidate that runs, and why the others do not.

    All take turns; the least time of each counts, which other work on the machine disturbs the least.
    """
    scores = 4 * use.heads * max(use.length, use.packing or 0) ** 2
    use = replace(use, batch=max(1, min(use.batch, _MOST_SCORES.get(use.device.type, 2**30) // scores)))
    calls: dict[str, Callable[[], None]] = {}
    left_out: dict[str, str] = {}
    for name in CANDIDATES:
        reason = obstacle(name, use)
        if name == "flex" and use.device.type == "cpu":
            reason = reason or "compiling it for a CPU takes longer than it saves"
        if reason is None:
            try:
                calls[name] = _call(implementation(name, use), use)
                calls[name]()  # what compiles does so now
            except Exception as error:  # a kernel that cannot do this shape says so in its own way
                calls.pop(name, None)
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if reason is not None:
            left_out[name] = reason
    times = {name: float("inf") for name in calls}
    end = time.perf_counter() + _SECONDS
    for turn in range(_ROUNDS):
        for name, call in calls.items():
            times[name] = min(times[name], _timed(call, use.device))
        if turn and time.perf_counter() > end:
            break
    return {name: round(1e3 * value, 4) for name, value in times.items()}, left_out


def _timed(call: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


class _Layer(nn.Module):
    """What attention functions read of the layer that calls them."""

    def __init__(self, config: Any, use: AttentionUse) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, 0, True
        self.num_key_value_groups = use.heads // (use.kv_heads or use.heads)
        self.train(use.training)


def attention_function(
    name: str, use: AttentionUse, packed: PackedRows | None = None
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Hugging Face's implementation `name` as a decoder calls it, with its mask made once.

    Args:
        name: Hugging Face's.
        use: where and for what; a prompt is half a sequence long.
        packed: the rows, with ``use.packing``; on the same device.

    Returns:
        A function of queries ``[B, H, T, D]`` and of keys and values with their heads, which may be differentiated;
        its result is ``[B, T, H, D]``. Of packed rows B and T are R and L.
    """
    from transformers import LlamaConfig
    from transformers.masking_utils import create_causal_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama.modeling_llama import eager_attention_forward

    from ntpseg.models.prefix import prefix_arguments
    from ntpseg.utils.transformers_compat import CACHE

    config: Any = LlamaConfig(
        hidden_size=use.heads * use.width,
        num_attention_heads=use.heads,
        num_key_value_heads=use.kv_heads or use.heads,
        head_dim=use.width,
        num_hidden_layers=1,
    )
    config._attn_implementation = name
    layer = _Layer(config, use)
    function: Any = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
    rows, length = (use.batch, use.length) if packed is None else packed.source.shape
    embeds = torch.zeros(rows, length, 1, dtype=use.dtype, device=use.device)
    arguments: dict[str, Any] = {"attention_mask": None}
    if use.prefix:
        prompts = torch.full((use.batch,), use.length // 2, device=use.device)
        arguments = prefix_arguments(config, embeds, None, prompts, packed)
    elif packed is not None:
        arguments = packed_arguments(packed, name, None)
    arguments["attention_mask"] = create_causal_mask(
        config=config,
        inputs_embeds=embeds,
        attention_mask=arguments["attention_mask"],
        position_ids=arguments.setdefault("position_ids", None),
        **{CACHE: None},
    )
    dropout = use.dropout if use.training else 0.0

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return function(layer, query, key, value, scaling=use.width**-0.5, dropout=dropout, **arguments)[0]

    return attend


def _call(name: str, use: AttentionUse) -> Callable[[], None]:
    """One call of Hugging Face's implementation `name`, mask and backward included."""
    packed = None
    rows, length = use.batch, use.length
    if use.packing is not None:
        plan = PackedRows.plan([use.length] * use.batch, use.packing)
        packed = PackedRows(**{key: value.to(use.device) for key, value in plan.tensors().items()})
        rows, length = packed.source.shape
    generator = torch.Generator(use.device).manual_seed(0)

    def random(heads: int) -> Tensor:
        made = torch.randn(rows, heads, length, use.width, generator=generator, device=use.device)
        return made.to(use.dtype).requires_grad_(use.training)

    inputs = random(use.heads), random(use.kv_heads or use.heads), random(use.kv_heads or use.heads)
    upstream = random(use.heads).detach().transpose(1, 2)
    attend = attention_function(name, use, packed)

    def call() -> None:
        with torch.set_grad_enabled(use.training):
            out = attend(*inputs)
            if use.training:
                torch.autograd.grad(out, inputs, upstream)

    return call


def _power(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def _may_measure() -> bool:
    wish = os.environ.get(MEASURE)
    return wish == "1" or (wish != "0" and _may_remember())


def _may_remember() -> bool:
    """Whether a result may depend on what this machine did before."""
    return os.environ.get(MEASURE) == "1" or not ("CI" in os.environ or "PYTEST_CURRENT_TEST" in os.environ)
