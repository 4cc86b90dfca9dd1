"""Which workspace ``LossOptions.workspace = "auto"`` takes, and a report of it.

One answer per device and process: the memory that the device can spare is read once, when a call first has a choice.
So calls of the same shape are divided alike, and repeat bit for bit, whatever else comes and goes on the device.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from ntpseg.kernels.chunks import plan_chunks, sum_share, workspace_bytes
from ntpseg.kernels.tuned_configs import configs_for

# "fast" where it takes at most this part of the spare memory: optimizer states and activations may be yet to come.
SPARE_FRACTION = 0.25
_logger = logging.getLogger("ntpseg.kernels")
_spare: dict[torch.device, int] = {}


def choose_workspace(
    workspace: str,
    device: torch.device,
    rows: int,
    classes: int,
    width: int,
    dtype: torch.dtype,
    *,
    fused: bool,
    BLOCK_N: int,
    needs_accumulator: bool,
    several_ranks: bool = False,
) -> str:
    """Resolves "auto" for `plan_chunks`, whose other arguments these are.

    Args:
        workspace: "auto", or one of `ntpseg.kernels.chunks.WORKSPACES`, which is returned as it is.
        device: of the operands; off CUDA "auto" is "small".
        rows, classes, width, dtype, fused, BLOCK_N, needs_accumulator: see `plan_chunks`.
        several_ranks: ranks share the vocabulary and must agree on the chunks: "auto" is "small", whatever memory each
            of them has.
    """
    if workspace != "auto":
        return workspace
    if device.type != "cuda" or several_ranks:
        return "small"
    how: dict[str, Any] = {"fused": fused, "BLOCK_N": BLOCK_N, "needs_accumulator": needs_accumulator}
    small = plan_chunks(rows, classes, width, dtype, **how)
    if small.count == 1:
        return "small"
    fast = plan_chunks(rows, classes, width, dtype, **how, workspace="fast")
    if fast == small:
        return "small"
    return (
        "fast"
        if workspace_bytes(fast, classes, width, dtype, **how) <= SPARE_FRACTION * spare_bytes(device)
        else "small"
    )


def spare_bytes(device: torch.device) -> int:
    """Memory of a CUDA device that was free, or held by PyTorch's allocator without use, when this was first asked.

    Nothing is synchronised beyond ``torch.cuda.mem_get_info``, which a CUDA graph's capture does not allow: asked there
    for the first time, it is half of the card.
    """
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device not in _spare:
        if torch.cuda.is_current_stream_capturing():
            _spare[device] = torch.cuda.get_device_properties(device).total_memory // 2
        else:
            free, _ = torch.cuda.mem_get_info(device)
            _spare[device] = free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        _logger.info(
            "workspace 'auto' on %s: 'fast' where that takes at most %.1f GiB, a quarter of the memory to spare",
            device,
            SPARE_FRACTION * _spare[device] / 2**30,
        )
    return _spare[device]


def give_up_fast(device: torch.device) -> None:
    """From here on "auto" is "small" on this device: a block of "fast" could not be had."""
    _logger.warning("workspace 'auto' on %s: 'small' from here on, there is no memory left for 'fast'", device)
    _spare[device] = 0


def workspace_report(
    rows: int,
    classes: int,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    *,
    workspace: str = "auto",
    chunk_bytes: int | None = None,
) -> dict[str, Any]:
    """What the Triton backend does for one weight matrix with gradients: for users and the rows of the benchmarks.

    Args:
        rows, classes, width: R of one segment (all heads where they share the weight), V (of ``vocab_range``) and D.
        dtype: of the operands.
        device: theirs.
        workspace, chunk_bytes: of `ntpseg.losses.LossOptions`.

    Returns:
        ``workspace`` ("small", "fast", or "chunk_bytes" where that decides), ``chunks``, ``chunk_rows``,
        ``split_accumulator``, ``bytes`` beyond the gradients, and ``sum_share``, the estimated time of the sum of the
        weight's gradient over that of the products.
    """
    device = torch.device(device)
    how: dict[str, Any] = {
        "fused": dtype != torch.float32,
        "BLOCK_N": configs_for(device).forward.BLOCK_N,
        "needs_accumulator": dtype == torch.bfloat16,
    }
    chosen = choose_workspace(workspace, device, rows, classes, width, dtype, **how)
    plan = plan_chunks(rows, classes, width, dtype, **how, chunk_bytes=chunk_bytes, workspace=chosen)
    share = sum_share(plan, rows, dtype.itemsize, needs_accumulator=how["needs_accumulator"])
    return {
        "workspace": chosen if chunk_bytes is None else "chunk_bytes",
        "chunks": plan.count,
        "chunk_rows": plan.rows,
        "split_accumulator": plan.split_accumulator,
        "bytes": workspace_bytes(plan, classes, width, dtype, **how),
        "sum_share": share,
    }
