"""A decoding step in fixed memory: on a GPU it is captured as a CUDA graph once and replayed, elsewhere it is called.

A step of a small model is hundreds of kernels of a few microseconds, each of which costs the CPU as long to launch. A
graph launches them together; for that every tensor must lie where it lay when the graph was captured.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Before the capture, on a stream of their own: libraries allocate workspaces and choose kernels in their first calls.
WARMUP = 2


class StaticStep:
    """A function of one token per row whose arguments and result always lie at the same addresses.

    Args:
        function: of tokens and grid ids ``[B, 1]`` and positions ``[B]``, all int64, to hidden states ``[B, 1, D]``. On
            a GPU it must not depend on anything on the host that changes, and what it reads beside its arguments must
            stay where it is. Calling it twice must do no harm.
        batch: B.
        device: of the tensors.
    """

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor], batch: int, device: torch.device) -> None:
        self.function = function
        # Outside of inference mode, so that a step can be called in and out of it.
        with torch.inference_mode(False):
            self.tokens, self.grid_ids = torch.zeros(2, batch, 1, dtype=torch.int64, device=device)
            self.positions = torch.zeros(batch, dtype=torch.int64, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Tensor | None = None

    def __call__(self, tokens: Tensor, grid_ids: Tensor, positions: Tensor) -> Tensor:
        """See `function`; the result is the caller's own."""
        self.tokens.copy_(tokens)
        self.grid_ids.copy_(grid_ids)
        self.positions.copy_(positions)
        if self.positions.is_cuda:
            if self.graph is None:
                self._capture()
            assert self.graph is not None
            self.graph.replay()
        else:
            self._call()
        assert self.output is not None
        return self.output.clone()

    def _call(self) -> None:
        hidden = self.function(self.tokens, self.grid_ids, self.positions)
        if self.output is None:
            with torch.inference_mode(False):
                self.output = torch.empty_like(hidden)
        self.output.copy_(hidden)

    def _capture(self) -> None:
        device = self.positions.device
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARMUP):
                    self._call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._call()
        self.graph = graph
