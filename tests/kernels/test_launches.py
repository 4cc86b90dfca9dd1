"""How many launches a whole loss is, forward and backward: counted in the interpreter, pinned here."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[1] / "losses"))

from loss_cases import draw

from ntpseg.kernels.tl_utils import INTERPRETED
from ntpseg.losses import fused
from ntpseg.ops.loss import LossInputs

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="CPU tensors need Triton's interpreter")

# operators that only allocate or look at a tensor in another way
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "_local_scalar_dense"}


class Launches(TorchDispatchMode):
    """Counts PyTorch operators that would launch a kernel, and launches of Triton kernels."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        from triton.runtime.interpreter import GridExecutor

        self.operators: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self._within = False
        launch = GridExecutor.__call__

        def counted(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.kernels[executor.fn.__name__] += 1
            self._within = True
            try:
                return launch(executor, *args, **kwargs)
            finally:
                self._within = False

        monkeypatch.setattr(GridExecutor, "__call__", counted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ntpseg":
            with self:  # into the operator
                return tuple(fused.fused_loss(LossInputs(*args)))
        name = func.overloadpacket.__name__
        if not (self._within or func.is_view or name in _FREE):
            self.operators[name] += 1
        return func(*args, **(kwargs or {}))


def _count(monkeypatch: pytest.MonkeyPatch, **keywords: Any) -> Launches:
    case = draw(dtype=torch.bfloat16, width=16, classes=40, time=12, **keywords)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    counted = Launches(monkeypatch)
    with counted:
        case.loss(hidden, weight, "triton").loss.backward()
    return counted


def test_launches_of_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = _count(monkeypatch)
    # among them the two products that read E, and the backward's ones_like
    assert counted.operators.total() == 10, counted.operators
    assert counted.kernels.total() == 18, counted.kernels


def test_launches_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    with Launches(monkeypatch) as counted:
        x = torch.ones(3)
        _ = x.view(3)[1:].exp() + torch.empty(2)
    assert counted.operators == {"ones": 1, "exp": 1, "add": 1}
