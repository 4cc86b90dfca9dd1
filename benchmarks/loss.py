"""The loss, forward and backward: ours, plain PyTorch, torch.compile and the fused cross-entropies of others.

All against three plain products of the same operands, ``H W^T``, ``G W`` and ``G^T H``. Ours and the composed baselines
compute CE, TCL and HET with per-token outputs; the peers compute CE alone ("does" says so in every row), and "peer +
terms" adds TCL and HET to a peer as its user would have to. Peers are given the supervised rows already compacted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import composed
from benchmarks.harness import Case, Contest, Contestant, Settings, Wrong
from benchmarks.operands import Operands, Shape
from benchmarks.oracle import Truth, truth
from benchmarks.peers.cross_entropy import PEERS, CrossEntropy, unavailable
from ntpseg import ntp_loss
from ntpseg.losses import LossOptions

FULL = "CE + TCL + HET"
# Relative errors, in norm for the gradients, that no right computation in the dtype reaches; logits rounded to bf16
# reach 1.5e-2. Predictions may miss the greatest logit by a rounding of it.
LIMITS = {
    "float32": {"loss": 1e-5, "d_hidden": 1e-4, "d_weight": 1e-4, "prediction": 1e-5},
    "bfloat16": {"loss": 5e-3, "d_hidden": 4e-2, "d_weight": 4e-2, "prediction": 8e-3},
    "float16": {"loss": 1e-3, "d_hidden": 5e-3, "d_weight": 5e-3, "prediction": 1e-3},
}
OURS_OVER_EAGER = 2.0  # the package promises at most twice the error of PyTorch itself at the same dtype
_FLOOR = {"float32": 2e-6, "bfloat16": 4e-3, "float16": 6e-4}  # two roundings of the result: below, there is no "twice"

Step = Callable[[], dict[str, Tensor | None]]


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """The grid."""
    for number, shape in enumerate(shapes(device, quick)):
        yield Case("loss", shape.parameters(), lambda settings, s=shape, n=number: contest(s, settings, quick, n))


def shapes(device: torch.device, quick: bool) -> list[Shape]:
    """Points of the grid; V = 32,768 are Emu3's visual codes, 184,622 its whole vocabulary."""
    both = ("random", "peaked")
    if device.type != "cuda":
        if quick:
            return [Shape(64, 32, 300, 2, 3, logits, "float32") for logits in both]
        grid = [Shape(1568, 256, 8192, 1, 5, logits, d) for logits in both for d in ("float32", "bfloat16")]
        grid += [Shape(784, 256, 8192, 4, 5, "peaked", "float32"), Shape(64, 128, 184622, dtype="float32")]
        return grid + [Shape(1568, 512, 32768, 1, 5, "peaked", d) for d in ("bfloat16", "float32")]
    if quick:  # what matters most comes first: a run may be cut off
        sizes = [(4096, 32768), (4096, 184622), (2048, 32768), (1024, 32768), (2048, 184622), (1024, 184622)]
        grid = [Shape(6272, d, v, logits="peaked") for d, v in sizes]
        return [*grid[:4], Shape(6272, 4096, 32768), *grid[4:], Shape(32768, 2048, 32768, 4, 5, "peaked")]
    wide = itertools.product((6272, 32768), (1024, 2048, 4096), (4096, 32768, 184622), both)
    grid = [Shape(r, d, v, logits=x) for r, d, v, x in wide]
    grid += [Shape(6272, 2048, 32768, k, m, "peaked") for k, m in ((1, 0), (1, 20), (2, 5), (4, 5))]
    return grid + [Shape(6272, 2048, 32768, dtype=d) for d in ("float16", "float32")]


def contest(shape: Shape, settings: Settings, quick: bool, seed: int) -> Contest:
    """All contestants on one shape."""
    device = settings.device
    operands = Operands.make(shape, device, seed)
    torch.compiler.reset()  # after eight shapes of one function torch.compile would quietly run it uncompiled
    judge = _Judge(operands)
    found: dict[str, Contestant] = {"three products": Contestant(lambda: products(operands), does="no loss at all")}
    found["eager"] = judge.contestant(lambda: baseline(operands, composed.whole), FULL)
    for backend in ("torch", "triton"):
        reason = None
        if backend == "triton" and device.type != "cuda":
            reason = "needs a CUDA device (a time in Triton's interpreter would mean nothing)"
        found[f"ntpseg {backend}"] = judge.contestant(lambda b=backend: ours(operands, b), FULL, reason)
    compiled = _no_compiler(device, shape, quick)
    found["torch.compile"] = judge.contestant(
        lambda: baseline(operands, torch.compile(composed.whole, dynamic=False)), FULL, compiled
    )
    found["eager CE"] = judge.contestant(lambda: cross_entropy(operands, composed.plain), "CE")
    found["torch.compile CE"] = judge.contestant(
        lambda: cross_entropy(operands, torch.compile(composed.plain, dynamic=False)), "CE", compiled
    )
    for name, peer in PEERS.items():
        reason = unavailable(peer, operands.rows, operands.weight)
        found[name] = judge.contestant(lambda p=peer: cross_entropy(operands, p.load()), peer.does, reason)
        if peer.terms:
            make = lambda p=peer: cross_entropy(operands, p.load(), terms=True)  # noqa: E731
            found[f"{name} + terms"] = judge.contestant(make, FULL, reason)
    rows, size = len(operands.target), operands.dtype.itemsize
    return Contest(
        found,
        reference="three products",
        flops=6.0 * rows * shape.width * shape.classes,
        bytes=size * (3.0 * rows * shape.classes + 4.0 * (rows + shape.classes) * shape.width),
        tokens=rows,
        forget=judge.known.clear,
        graphs=False,  # a training step launches its kernels one by one, and so is it timed
        dtype=operands.dtype,
    )


def products(operands: Operands) -> Callable[[], None]:
    """The three products, their outputs allocated beforehand."""
    rows, weight = operands.rows, operands.weight
    scores = torch.empty(len(rows), len(weight), dtype=rows.dtype, device=rows.device)
    d_rows, d_weight = torch.empty_like(rows), torch.empty_like(weight)

    def step() -> None:
        torch.mm(rows, weight.t(), out=scores)
        torch.mm(scores, weight, out=d_rows)
        torch.mm(scores.t(), rows, out=d_weight)

    return step


def ours(operands: Operands, backend: str) -> Step:
    """`ntp_loss` as a training step calls it: all positions, unshifted labels."""
    hidden = operands.hidden.detach().requires_grad_()
    weight = operands.weight.detach().requires_grad_()
    options = LossOptions(negatives=operands.shape.negatives, backend=backend, per_head=operands.shape.heads > 1)
    b, t, j = operands.place

    def step() -> dict[str, Tensor | None]:
        out = ntp_loss(hidden, weight, operands.labels, het=operands.het, options=options)
        out.loss.backward()
        prediction = out.prediction.unsqueeze(2) if out.head_prediction is None else out.head_prediction
        return {"loss": out.loss.detach(), "hidden": taken(hidden), "d_weight": taken(weight), "tokens": prediction}

    def rows_of(found: dict[str, Any]) -> dict[str, Tensor | None]:
        return found | {"d_hidden": found["hidden"][b, t, j], "prediction": found["tokens"][b, t + 1 + j, j]}

    step.rows_of = rows_of  # type: ignore[attr-defined]
    return step


def baseline(operands: Operands, call: Callable[..., tuple[Tensor, Tensor]]) -> Step:
    """The whole loss from whole logits."""
    rows, weight = operands.rows.detach().requires_grad_(), operands.weight.detach().requires_grad_()
    extra = (operands.target, *operands.before, *operands.hard)

    def step() -> dict[str, Tensor | None]:
        loss, prediction = call(rows, weight, *extra)
        loss.backward()
        return {"loss": loss.detach(), "d_hidden": taken(rows), "d_weight": taken(weight), "prediction": prediction}

    return step


def cross_entropy(operands: Operands, call: CrossEntropy, *, terms: bool = False) -> Step:
    """A cross-entropy alone, or with TCL and HET composed beside it."""
    rows, weight = operands.rows.detach().requires_grad_(), operands.weight.detach().requires_grad_()

    def step() -> dict[str, Tensor | None]:
        loss = call(rows, weight, operands.target)
        prediction = None
        if terms:
            more, prediction = composed.beside(operands, rows, weight)
            loss = loss.float() + more
        loss.backward()
        return {"loss": loss.detach(), "d_hidden": taken(rows), "d_weight": taken(weight), "prediction": prediction}

    return step


def taken(leaf: Tensor) -> Tensor | None:
    """The gradient, taken off its leaf: a step leaves no memory behind, so that its peak counts its gradients too."""
    gradient, leaf.grad = leaf.grad, None
    return gradient


class _Judge:
    """Errors of contestants against float64, the truth computed once where predictions agree."""

    def __init__(self, operands: Operands) -> None:
        self.operands = operands
        self.known: list[tuple[bool, Truth]] = []
        self.eager: dict[str, float] | None = None

    def contestant(self, make: Callable[[], Step], does: str, reason: str | None = None) -> Contestant:
        return Contestant(make, lambda step: self.errors(step, does), reason, does)

    def errors(self, step: Any, does: str) -> dict[str, float]:
        """Relative errors.

        Raises:
            Wrong: one of them is above its limit, or no number.
        """
        poison(self.operands.weight.device)
        found = step()
        owned = hasattr(step, "rows_of")
        if owned:
            found = step.rows_of(found)
        right = self.truth(does == FULL, found["prediction"])
        errors = {
            "loss": float((found["loss"].double() - right.loss).abs() / right.loss.abs()),
            "d_hidden": distance(found["d_hidden"], right.d_rows),
            "d_weight": distance(found["d_weight"], right.d_weight),
        }
        if found["prediction"] is not None:
            errors["prediction"] = right.gap
        name = self.operands.shape.dtype
        limits = dict(LIMITS[name])
        if owned and self.eager is not None:
            for part in ("d_hidden", "d_weight"):
                limits[part] = min(limits[part], max(OURS_OVER_EAGER * self.eager[part], _FLOOR[name]))
        if not owned and does == FULL and self.eager is None:
            self.eager = errors
        for part, error in errors.items():
            if not error <= limits[part]:
                raise Wrong(errors, f"{part} is off by {error:.2g}, the limit is {limits[part]:.2g}")
        return errors

    def truth(self, terms: bool, prediction: Tensor | None) -> Truth:
        for of_terms, known in self.known:
            if of_terms == terms and (prediction is None or torch.equal(known.prediction, prediction)):
                return known
        found = truth(self.operands, terms=terms, prediction=prediction)
        # two at most: each holds the gradients in float64
        self.known[:] = [item for item in self.known if item[0] != terms] + [(terms, found)]
        return found


def distance(found: Tensor | None, right: Tensor) -> float:
    """``|found - right| / |right|`` in norm; infinite where there is nothing or a NaN."""
    if found is None:
        return float("inf")
    return float(torch.linalg.vector_norm(found.double() - right) / torch.linalg.vector_norm(right))


def poison(device: torch.device) -> None:
    """Fills memory that the next allocations will get with NaN, so that an output left unwritten shows."""
    size = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 64 << 20
    torch.full((size // 4,), float("nan"), device=device)


def _no_compiler(device: torch.device, shape: Shape, quick: bool) -> str | None:
    if quick and (device.type != "cuda" or shape.width != 4096 or shape.logits != "peaked"):
        where = " but for D = 4096, peaked" if device.type == "cuda" else " on a CPU"
        return f"left out of --quick{where}: compiling takes longer than all the rest"
    return None
