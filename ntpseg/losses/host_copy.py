"""Integers on their way from the device to the host, while the host launches what does not depend on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HostCopy:
    """A copy that the current stream will make.

    Attributes:
        values: on the host, pinned; valid once `ready` has happened. Every copy has memory of its own: PyTorch's pinned
            allocator hands a block out again only when the stream is done with it.
        ready: None where the values were on the host all along.
    """

    values: Tensor
    ready: torch.cuda.Event | None

    @staticmethod
    def start(source: Tensor) -> HostCopy:
        """Enqueues the copy on the current stream of the source's device and returns at once.

        Raises:
            ValueError: a CUDA graph is being captured, in which nobody could wait.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise ValueError("max_rows must be set in a CUDA graph, where no count of rows can be read, got None")
        if not source.is_cuda:
            return HostCopy(source, None)
        values = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        values.copy_(source, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(source.device))
        return HostCopy(values, ready)

    def wait(self) -> list[int]:
        """The values, after what was enqueued before the copy and none of what was enqueued since."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.values.tolist()
