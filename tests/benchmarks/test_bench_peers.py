"""The adapters of `benchmarks.peers`: each call fits its peer's signature, and computes the mean cross-entropy.

The peers need a GPU. Installed ones are held against their real signatures; stand-ins, written down from the releases
that the adapters were read off, stand for those that are not installed, so that an adapter's own logic runs everywhere.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks import loss
from benchmarks.harness import Inaccurate
from benchmarks.operands import Operands, Shape
from benchmarks.peers import cross_entropy
from benchmarks.peers.cross_entropy import PEERS, Peer, unavailable
from benchmarks.verifier import FULL, Verifier

CPU = torch.device("cpu")


def _mean(rows: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(rows @ weight.t(), target)


class _LigerLoss:  # liger-kernel 0.8.5
    def __init__(
        self,
        ce_weight=None,
        ignore_index=-100,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="mean",
        softcap=None,
        return_z_loss=False,
        accum_dtype=None,
        use_token_scaling=False,
        return_token_accuracy=False,
        return_predicted_tokens=False,
    ) -> None:
        assert reduction == "mean" and accum_dtype in (None, torch.float32)

    def __call__(self, lin_weight, _input, target, bias=None):
        return _mean(_input, lin_weight, target)


def _liger_sm90(_input, weight, target, ignore_index=-100, reduction="mean"):
    assert reduction == "mean"
    return _mean(_input, weight, target)


def _cut(  # cut-cross-entropy 25.1.1
    e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high", impl="default"
):
    assert reduction == "mean" and not shift and filter_eps in ("high", None) and impl == "cce"
    return _mean(e, c, targets)


def _quack_chunked(  # quack-kernels 0.6.5
    x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True, use_scaled_exp=None
):
    assert reduction == "mean" and use_scaled_exp is None
    return _mean(x, weight, target)


def _quack_unfused(x, weight, bias, target, ignore_index=-100, reduction="mean", inplace_backward=False):
    assert bias is None and reduction == "mean"
    return _mean(x, weight, target)


STAND_INS: dict[str, dict[str, Any]] = {
    "liger_kernel.transformers.fused_linear_cross_entropy": {"LigerFusedLinearCrossEntropyLoss": _LigerLoss},
    "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90": {
        "liger_fused_linear_cross_entropy_sm90": _liger_sm90
    },
    "cut_cross_entropy": {"linear_cross_entropy": _cut},
    "quack.linear_cross_entropy": {
        "chunked_linear_cross_entropy": _quack_chunked,
        "linear_cross_entropy_func": _quack_unfused,
    },
}


CALLED = {  # what each adapter calls
    "liger": ("liger_kernel.transformers.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyLoss"),
    "liger fp32 sum": ("liger_kernel.transformers.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyLoss"),
    "liger sm90": (
        "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90",
        "liger_fused_linear_cross_entropy_sm90",
    ),
    "cut-cross-entropy": ("cut_cross_entropy", "linear_cross_entropy"),
    "cut-cross-entropy exact": ("cut_cross_entropy", "linear_cross_entropy"),
    "quack": ("quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
    "quack unfused": ("quack.linear_cross_entropy", "linear_cross_entropy_func"),
}


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    for path, names in STAND_INS.items():
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            name = ".".join(parts[:length])
            module = ModuleType(name)
            module.__path__ = []  # type: ignore[attr-defined]
            if length == len(parts):
                vars(module).update(names)
            monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("name", PEERS)
def test_adapters_compute_the_mean(name: str, stand_ins: None) -> None:
    if name.startswith("torch") and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this PyTorch has no linear cross-entropy")
    operands = Operands.random(Shape(16, 16, 40, 1, 2, "peaked", "float32"), CPU)
    call = PEERS[name].load()
    assert max(Verifier(operands).errors(loss.cross_entropy(operands, call), "CE").values()) < 1e-5
    if PEERS[name].terms:
        step = loss.cross_entropy(operands, call, terms=True)
        assert max(Verifier(operands).errors(step, FULL).values()) < 1e-5


def test_a_sum_in_place_of_the_mean_gets_no_time(stand_ins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    operands = Operands.random(Shape(16, 16, 40, 1, 2, "random", "float32"), CPU)
    wrong = lambda *args, **_: _mean(*args[:3]) * len(operands.target)  # noqa: E731
    monkeypatch.setattr(sys.modules["quack.linear_cross_entropy"], "chunked_linear_cross_entropy", wrong)
    with pytest.raises(Inaccurate, match="loss"):
        Verifier(operands).errors(loss.cross_entropy(operands, PEERS["quack"].load()), "CE")


@pytest.mark.parametrize("name", [name for name in PEERS if name != "torch linear_cross_entropy"])
def test_calls_fit_the_installed_peer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its real signature is bound to what the adapter passes; nothing is computed."""
    path, attribute = CALLED[name]
    try:
        module = importlib.import_module(path)
    except Exception as error:  # not installed, or not for this machine
        pytest.skip(f"{type(error).__name__}: {error}")
    real, bound = getattr(module, attribute), []

    def bind(signature: inspect.Signature, *args: Any, **kwargs: Any) -> torch.Tensor:
        bound.append(signature.bind(*args, **kwargs).arguments)
        return torch.zeros(())

    if inspect.isclass(real):  # its constructor runs for real
        signature = inspect.signature(real.forward)
        monkeypatch.setattr(real, "forward", lambda *args, **kwargs: bind(signature, *args, **kwargs))
        stood, known = inspect.signature(STAND_INS[path][attribute]), inspect.signature(real)
    else:
        known, stood = inspect.signature(real), inspect.signature(STAND_INS[path][attribute])
        monkeypatch.setattr(module, attribute, lambda *args, **kwargs: bind(known, *args, **kwargs))
    PEERS[name].load()(torch.zeros(16, 8), torch.zeros(40, 8), torch.zeros(16, dtype=torch.int64))
    (arguments,) = bound
    shapes = [tuple(x.shape) for x in arguments.values() if isinstance(x, torch.Tensor)]
    assert sorted(shapes) == [(16,), (16, 8), (40, 8)]
    for parameter in stood.parameters.values():  # the stand-in above says what the real one says
        assert parameter.name in known.parameters, parameter.name
        if parameter.default is not parameter.empty and parameter.name != "impl":
            assert known.parameters[parameter.name].default == parameter.default, parameter.name


def _operands(rows: int, classes: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(rows, width, dtype=dtype), torch.empty(classes, width, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "reason"),
    [
        ("quack", (6272, 184622, 8), torch.bfloat16, "V in multiples of 8, not 184622"),
        ("quack", (6272, 32768, 8), torch.bfloat16, None),
        ("quack", (6270, 32768, 8), torch.bfloat16, "R in multiples of 8"),
        ("quack unfused", (6272, 184622, 8), torch.bfloat16, None),
        ("quack unfused", (6272, 32768, 8), torch.bfloat16, "only where its chunked path cannot be used"),
        ("liger sm90", (6272, 32768, 8), torch.bfloat16, None),
        ("liger sm90", (6272, 184622, 8), torch.bfloat16, "V in multiples of 256"),
        ("liger sm90", (6272, 32768, 8), torch.float16, "bfloat16 only, not float16"),
        ("cut-cross-entropy", (6272, 184622, 8), torch.bfloat16, None),
        ("cut-cross-entropy exact", (64, 300, 8), torch.float32, "bfloat16 and float16 only, not float32"),
        ("liger", (63, 301, 7), torch.float32, None),
    ],
)
def test_what_a_peer_cannot_take(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype, reason: str | None
) -> None:
    refused = PEERS[name].refuses(*_operands(*shape, dtype))
    assert refused is None if reason is None else reason in str(refused)


def test_a_broken_installation_is_a_reason() -> None:
    def load() -> cross_entropy.CrossEntropy:
        raise OSError("libcuda.so.1: cannot open shared object file\nmore")

    operands = _operands(8, 8, 8, torch.float32)
    reason = "OSError: libcuda.so.1: cannot open shared object file"
    assert unavailable(Peer(load, False, "CE"), *operands) == reason
    assert unavailable(Peer(load, True, "CE"), *operands) == "needs a CUDA device"
