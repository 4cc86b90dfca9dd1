"""The loss, forward and backward: ours, plain PyTorch, torch.compile and the fused cross-entropies of others.

All against three plain products of the same operands, ``H W^T``, ``G W`` and ``G^T H``. Ours and the composed baselines
compute CE, TCL and HET with per-token outputs; the peers compute CE alone ("does" says so in every row), and "peer +
terms" adds TCL and HET to a peer as its user would have to. Peers are given the supervised rows already compacted.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import composed
from benchmarks.harness import PEAK, Case, Comparison, Grid, Provider, Settings
from benchmarks.harness.environment import device_name
from benchmarks.operands import Operands, Shape
from benchmarks.peers.cross_entropy import PEERS, CrossEntropy, unavailable
from benchmarks.trained import GRADIENT_FILTER, filter_facts, trained_operands
from benchmarks.verifier import FULL, Step, Verifier
from ntpseg import ntp_loss
from ntpseg.losses import LossOptions

PRODUCTS, FLOAT32_PRODUCTS = "three products", "three products in float32"
PYTORCH = "torch linear_cross_entropy"
# What the CPU path promises at the full shape of the grid "gate": ratios of medians, and memory beside the gradients.
GATE_RATIOS = {"float32": {PRODUCTS: 1.10, PYTORCH: 0.75}, "bfloat16": {PRODUCTS: 1.30, PYTORCH: 0.75}}
GATE_EXTRA_BYTES = 200e6


def cases(device: torch.device, grid: Grid) -> Iterator[Case]:
    """The grid."""
    for seed, shape in enumerate(shapes(device, grid)):
        yield Case("loss", shape.parameters(), partial(_drawn, shape, grid, seed))


def trained_cases(run: Path) -> Iterator[Case]:
    """One case: the validation tokens of a finished training, with and without gradient filtering."""
    operands = trained_operands(run)
    yield Case("loss", operands.shape.parameters(), partial(_trained, operands))


def shapes(device: torch.device, grid: Grid) -> list[Shape]:
    """Points of the grid; V = 32,768 are Emu3's visual codes, 184,622 its whole vocabulary."""
    logits, dtypes = ("random", "peaked"), ("float32", "bfloat16")
    if grid == "gate":  # few rows for a processor on which PyTorch's own bfloat16 products take minutes
        return [Shape(r, 512, 32768, dtype=d) for r in (6272, 128) for d in dtypes]
    if device.type != "cuda":
        if grid == "quick":
            return [Shape(64, 32, 300, 2, 3, x, "float32") for x in logits]
        points = [Shape(1568, 256, 8192, 1, 5, x, d) for x in logits for d in dtypes]
        points += [Shape(784, 256, 8192, 4, 5, "peaked", "float32"), Shape(64, 128, 184622, dtype="float32")]
        return points + [Shape(1568, 512, 32768, 1, 5, "peaked", d) for d in reversed(dtypes)]
    if grid == "quick":  # what matters most comes first: a run may be cut off
        sizes = [(4096, 32768), (4096, 184622), (2048, 32768), (1024, 32768), (2048, 184622), (1024, 184622)]
        points = [Shape(6272, d, v, logits="peaked") for d, v in sizes]
        points = [*points[:4], Shape(6272, 4096, 32768), *points[4:], Shape(32768, 2048, 32768, 4, 5, "peaked")]
        # a width that does not divide the slices of the weight's gradient, and so many rows that it is summed in them
        return [*points, Shape(32768, 1536, 151936, logits="peaked")]
    wide = itertools.product((6272, 32768), (1024, 2048, 4096), (4096, 32768, 184622), logits)
    points = [Shape(r, d, v, logits=x) for r, d, v, x in wide]
    points += [Shape(6272, 2048, 32768, k, m, "peaked") for k, m in ((1, 0), (1, 20), (2, 5), (4, 5))]
    return points + [Shape(6272, 2048, 32768, dtype=d) for d in ("float16", "float32")]


def _drawn(shape: Shape, grid: Grid, seed: int, settings: Settings) -> Comparison:
    operands = Operands.random(shape, settings.device, seed)
    comparison = compare(operands, settings.device, quick=grid == "quick")
    if grid == "gate":
        _gate(comparison, operands)
    return comparison


def _trained(operands: Operands, settings: Settings) -> Comparison:
    operands = operands.to(settings.device)
    backend = "triton" if settings.device.type == "cuda" else "torch"
    exact, filtered = (ours(operands, backend, threshold)() for threshold in (0.0, GRADIENT_FILTER))
    comparison = compare(operands, settings.device, filtered=True)
    comparison.facts["gradient_filter"] = filter_facts(operands, exact, filtered)
    return comparison


def compare(operands: Operands, device: torch.device, *, quick: bool = False, filtered: bool = False) -> Comparison:
    """All providers on the same operands.

    Args:
        operands: of any shape.
        device: where they lie.
        quick: leave out what takes long to compile.
        filtered: ours with gradient filtering too.
    """
    shape = operands.shape
    torch.compiler.reset()  # after eight shapes of one function torch.compile would quietly run it uncompiled
    verifier = Verifier(operands)
    providers = {PRODUCTS: Provider(partial(products, operands.rows, operands.weight), computes="no loss at all")}
    providers["eager"] = verifier.provider(partial(baseline, operands, composed.full_loss), FULL)
    for backend in ("torch", "triton"):
        reason = None
        if backend == "triton" and device.type != "cuda":
            reason = "needs a CUDA device (a time in Triton's interpreter would mean nothing)"
        providers[f"ntpseg {backend}"] = verifier.provider(partial(ours, operands, backend), FULL, reason)
        if filtered:
            setup = partial(ours, operands, backend, GRADIENT_FILTER)
            providers[f"ntpseg {backend} filtered"] = verifier.provider(setup, FULL, reason, filtered=True)
    reason = None if device.type == "cuda" else "needs a CUDA device (a step in a CUDA graph)"
    providers["ntpseg triton graph"] = verifier.provider(partial(graphed, operands), FULL, reason)
    slow = _no_compiler(device, shape, quick)
    providers["torch.compile"] = verifier.provider(
        lambda: baseline(operands, torch.compile(composed.full_loss, dynamic=False)), FULL, slow
    )
    providers["eager CE"] = verifier.provider(partial(cross_entropy, operands, composed.cross_entropy), "CE")
    providers["torch.compile CE"] = verifier.provider(
        lambda: cross_entropy(operands, torch.compile(composed.cross_entropy, dynamic=False)), "CE", slow
    )
    for name, peer in PEERS.items():
        reason = unavailable(peer, operands.rows, operands.weight)
        for terms in (False, True) if peer.terms else (False,):
            title, computes = (f"{name} + terms", FULL) if terms else (name, peer.computes)
            providers[title] = verifier.provider(partial(_peer, operands, peer.load, terms), computes, reason)
    rows, size = len(operands.target), operands.dtype.itemsize
    return Comparison(
        providers,
        reference=PRODUCTS,
        flops=6.0 * rows * shape.width * shape.classes,
        bytes=size * (3.0 * rows * shape.classes + 4.0 * (rows + shape.classes) * shape.width),
        tokens=rows,
        release=verifier.known.clear,
        graphs=False,  # a training step launches its kernels one by one, and so is it timed
        dtype=operands.dtype,
        facts=_workspace(operands),
    )


def _workspace(operands: Operands) -> dict[str, Any]:
    """What `LossOptions.workspace` came to, where the Triton backend runs."""
    device = operands.weight.device
    if device.type != "cuda":
        return {}
    try:
        from ntpseg.kernels.memory import workspace_report
    except ImportError:  # with --base this runs beside a revision of the package that may lack it
        return {}
    classes, width = operands.weight.shape
    return {"workspace": workspace_report(len(operands.target), classes, width, operands.dtype, device)}


def _gate(comparison: Comparison, operands: Operands) -> None:
    """Keeps the providers that limits are promised against, and adds the yardstick of processors without bf16 units.

    There PyTorch's own bfloat16 products are so slow that beating them says nothing: the products in float32 are the
    reference.
    """
    dtype = operands.shape.dtype
    kept = (PRODUCTS, "ntpseg torch", PYTORCH)
    comparison.providers = {name: comparison.providers[name] for name in kept}
    if dtype != "float32":
        comparison.providers[FLOAT32_PRODUCTS] = Provider(
            lambda: products(operands.rows.float(), operands.weight.float()), computes="no loss at all"
        )
        if "bf16" not in device_name(operands.weight.device):
            comparison.reference = FLOAT32_PRODUCTS
    if operands.shape.rows >= 1024:
        gradients = (operands.hidden.numel() + operands.weight.numel()) * operands.dtype.itemsize
        limits = {**GATE_RATIOS[dtype], PEAK: GATE_EXTRA_BYTES + gradients}
        comparison.providers["ntpseg torch"].limits = limits


def products(rows: Tensor, weight: Tensor) -> Callable[[], None]:
    """The three products, their outputs allocated beforehand."""
    scores = torch.empty(len(rows), len(weight), dtype=rows.dtype, device=rows.device)
    d_rows, d_weight = torch.empty_like(rows), torch.empty_like(weight)

    def step() -> None:
        torch.mm(rows, weight.t(), out=scores)
        torch.mm(scores, weight, out=d_rows)
        torch.mm(scores.t(), rows, out=d_weight)

    return step


def ours(operands: Operands, backend: str, gradient_filter: float = 0.0, max_rows: int | None = None) -> Step:
    """`ntp_loss` as a training step calls it: all positions, unshifted labels; `max_rows` as in `LossOptions`."""
    hidden = operands.hidden.detach().requires_grad_()
    weight = operands.weight.detach().requires_grad_()
    options = LossOptions(
        negatives=operands.shape.negatives,
        backend=backend,
        per_head=operands.shape.heads > 1,
        gradient_filter=gradient_filter,
        max_rows=max_rows,
    )
    b, t, j = operands.index

    def step() -> dict[str, Tensor | None]:
        out = ntp_loss(hidden, weight, operands.labels, het=operands.het, options=options)
        out.loss.backward()
        prediction = out.prediction.unsqueeze(2) if out.head_prediction is None else out.head_prediction
        return {
            "loss": out.loss.detach(),
            "hidden": take_gradient(hidden),
            "d_weight": take_gradient(weight),
            "tokens": prediction,
        }

    def rows_of(result: dict[str, Any]) -> dict[str, Tensor | None]:
        return result | {"d_hidden": result["hidden"][b, t, j], "prediction": result["tokens"][b, t + 1 + j, j]}

    step.rows_of = rows_of  # type: ignore[attr-defined]  # what the verifier calls, outside the timing
    return step


def graphed(operands: Operands) -> Step:
    """`ours` on the Triton backend, loss and backward, captured in a CUDA graph; a step is one replay of it.

    The caller knows how many rows a head has at most, so that nothing is copied to the host. Results lie in the graph's
    memory, where each replay writes them anew. The peak memory is the capture's: a replay allocates nothing.
    """
    step = ours(operands, "triton", max_rows=int(operands.index[2].bincount().max()))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    peak = torch.cuda.max_memory_allocated()
    for part in result.values():  # nothing has run yet: what a replay leaves unwritten must not look right
        if part is not None:
            part.fill_(torch.nan if part.is_floating_point() else -1)

    def replay() -> dict[str, Tensor | None]:
        graph.replay()
        return result

    replay.rows_of = step.rows_of  # type: ignore[attr-defined]
    replay.memory = {"delta": peak - before, "absolute": peak, "method": "max_memory_allocated"}  # type: ignore[attr-defined]
    return replay


def baseline(operands: Operands, call: Callable[..., tuple[Tensor, Tensor]]) -> Step:
    """The whole loss from whole logits."""
    arguments = (operands.target, *operands.predecessors, *operands.hard)
    return _step(operands, lambda rows, weight: call(rows, weight, *arguments))


def cross_entropy(operands: Operands, call: CrossEntropy, *, terms: bool = False) -> Step:
    """A cross-entropy alone, or with TCL and HET composed beside it."""

    def loss(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        value = call(rows, weight, operands.target)
        if not terms:
            return value, None
        more, prediction = composed.tcl_het(operands, rows, weight)
        return value.float() + more, prediction

    return _step(operands, loss)


def _peer(operands: Operands, load: Callable[[], CrossEntropy], terms: bool) -> Step:
    return cross_entropy(operands, load(), terms=terms)


def _step(operands: Operands, call: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]) -> Step:
    rows, weight = operands.rows.detach().requires_grad_(), operands.weight.detach().requires_grad_()

    def step() -> dict[str, Tensor | None]:
        loss, prediction = call(rows, weight)
        loss.backward()
        gradients = {"d_hidden": take_gradient(rows), "d_weight": take_gradient(weight)}
        return {"loss": loss.detach(), **gradients, "prediction": prediction}

    return step


def take_gradient(leaf: Tensor) -> Tensor | None:
    """The gradient, taken off its leaf: a step leaves no memory behind, so that its peak counts its gradients too."""
    gradient, leaf.grad = leaf.grad, None
    return gradient


def _no_compiler(device: torch.device, shape: Shape, quick: bool) -> str | None:
    if quick and (device.type != "cuda" or shape.width != 4096 or shape.logits != "peaked"):
        where = " but for D = 4096, peaked" if device.type == "cuda" else " on a CPU"
        return f"left out of --quick{where}: compiling takes longer than all the rest"
    return None
