"""A whole training step: forward, loss, backward, AdamW; tokens per second, model FLOPs utilisation, peak memory.

The reference is the products alone: for every linear layer ``X W^T``, ``G W`` and ``G^T X`` over all tokens, and the
same for the head over the supervised ones. Ours trains CE + TCL + HET; transformers' own model CE with whole logits.
FLOPs of a step are those of `ntpseg.models.flops`, which the logs of training show.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, Comparison, Grid, Inaccurate, Provider, Settings, check_errors, relative_error
from benchmarks.models import Size, hugging_face, matrices
from benchmarks.peers import import_error
from ntpseg.models import NTPSegModel
from ntpseg.models.attention import default_attention

LIMITS = {"float32": {"loss": 1e-5, "d_head": 1e-3}, "bfloat16": {"loss": 1e-2, "d_head": 6e-2}}


GRIDS = {
    ("cpu", "quick"): [Size("smallest", 4, 24, 64, batch=2, dtype="float32")],
    ("cpu", "full"): [Size("tiny", 14, 512, dtype=d) for d in ("float32", "bfloat16")],
    ("cuda", "quick"): [Size("base", 28, 32768, 2048, batch=8)],
    ("cuda", "full"): [Size(p, 28, 32768, 2048, batch=16, heads=k) for p in ("small", "base") for k in (1, 4)],
}


def cases(device: torch.device, grid: Grid) -> Iterator[Case]:
    """Models and batches."""
    for size in GRIDS[device.type, grid]:
        yield Case("train", size.parameters(), partial(_comparison, size))


def _comparison(size: Size, settings: Settings) -> Comparison:
    device, dtype = settings.device, getattr(torch, size.dtype)
    ids, labels = size.batch_of(device)
    model = size.model(device)
    rows = int((labels[:, 1:] != -100).sum())
    truth: dict[str, Tensor] = {}

    def check(step: _Step) -> dict[str, float]:
        if not truth:
            truth.update(_truth(model, ids, labels))
        loss, gradient = step.plain()
        errors = {
            "loss": float((loss.double() - truth["loss"]).abs() / truth["loss"]),
            "d_head": relative_error(gradient, truth["d_head"]),
        }
        check_errors(errors, LIMITS[size.dtype])
        step()
        return errors

    single = None if size.heads == 1 else "its model has one head"
    liger = single or (None if device.type == "cuda" else "needs a CUDA device")
    liger = liger or import_error("liger_kernel.transformers", cuda=True)
    ours, theirs = partial(_ours, model, ids, labels, dtype), partial(_theirs, model, ids, labels, dtype)
    providers = {
        "products": Provider(
            partial(products, model, ids.numel(), rows * size.heads, dtype), computes="linear layers only"
        ),
        "ntpseg": Provider(ours, check if size.heads == 1 else _check_finite, computes="CE + TCL + HET"),
        "transformers": Provider(partial(theirs, liger=False), check, single, "CE"),
        "transformers + liger": Provider(partial(theirs, liger=True), check, liger, "CE; Liger's loss, norms and MLPs"),
    }
    return Comparison(
        providers,
        "products",
        flops=step_flops(model, ids, rows),
        tokens=ids.numel(),
        graphs=False,
        dtype=dtype,
        release=truth.clear,
    )


def step_flops(model: NTPSegModel, ids: Tensor, rows: int) -> float:
    """Floating-point operations of a step on ids ``[B, T]`` without padding, `rows` of them supervised in each head."""
    try:
        from ntpseg.models.flops import TrainingFlops
    except ImportError:  # with --base: an older revision of the package
        return 0.0
    squares = len(ids) * ids.shape[1] ** 2
    return TrainingFlops.of(model).step(tokens=ids.numel(), squares=squares, rows=[rows] * model.config.num_heads_k)


class _Step:
    """One training step of a model of its own.

    Args:
        model: what is trained.
        head: its output matrix.
        dtype: of the products.
        loss: computes what is trained on.
        cross_entropy: computes the cross-entropy alone; `loss` by default.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        head: Tensor,
        dtype: torch.dtype,
        loss: Callable[[], Tensor],
        cross_entropy: Callable[[], Tensor] | None = None,
    ) -> None:
        self.head, self.loss, self.cross_entropy = head, loss, cross_entropy or loss
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        self.autocast = torch.autocast(head.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)

    def plain(self) -> tuple[Tensor, Tensor]:
        """The cross-entropy and its gradient of the head, without an update."""
        loss = self._backward(self.cross_entropy)
        assert self.head.grad is not None
        gradient = self.head.grad.clone()
        self.optimizer.zero_grad()
        return loss, gradient

    def __call__(self) -> Tensor:
        loss = self._backward(self.loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def _backward(self, call: Callable[[], Tensor]) -> Tensor:
        with self.autocast:
            loss = call()
        loss.backward()
        return loss.detach()


def _ours(model: NTPSegModel, ids: Tensor, labels: Tensor, dtype: torch.dtype, attention: str | None = None) -> _Step:
    own = NTPSegModel(model.config)
    own.to(ids.device)  # type: ignore[arg-type]  # transformers hides the signature of `to`
    own.load_state_dict(model.state_dict())
    attention = attention or default_attention()  # what `ntpseg train` takes where nothing is named
    if attention:
        own.set_attn_implementation(attention)
    supervised = (labels[0] != -100).nonzero().flatten()
    position = supervised[:: max(1, len(supervised) // 16)].expand(len(ids), -1).contiguous()
    token = labels.gather(1, position).flip(0).contiguous()  # another sample's token is mostly a wrong one
    batch = {"input_ids": ids, "labels": labels, "loss_start": int(supervised[0])}

    def cross_entropy() -> Tensor:
        tcl_weight, own.config.tcl_weight = own.config.tcl_weight, 0.0
        try:
            return own(**batch).loss
        finally:
            own.config.tcl_weight = tcl_weight

    def loss() -> Tensor:
        return own(**batch, het_position=position, het_token=token).loss

    return _Step(own, own.heads.weight, dtype, loss, cross_entropy)


def _theirs(model: NTPSegModel, ids: Tensor, labels: Tensor, dtype: torch.dtype, *, liger: bool) -> _Step:
    peer = hugging_face(model).train()
    if liger:
        _use_liger(peer)
    return _Step(peer, peer.lm_head.weight, dtype, lambda: peer(input_ids=ids, labels=labels).loss)


def _use_liger(model: Any) -> None:
    """Liger's loss, norms and MLPs in this one model (its rotary embedding would be everybody's)."""
    patch = importlib.import_module("liger_kernel.transformers.monkey_patch")
    modeling = importlib.import_module(type(model).__module__)
    before = dict(vars(modeling))
    try:
        patch._apply_liger_kernel_to_instance(model=model)
    finally:
        # it also replaces names in the module, from which later models, ours among them, would be built
        vars(modeling).update(before)


def products(model: NTPSegModel, tokens: int, rows: int, dtype: torch.dtype) -> Callable[[], None]:
    """The three products of every linear layer and of the head, inputs and outputs allocated beforehand."""
    device = model.heads.weight.device
    work = [(tokens, weight.to(dtype)) for weight in matrices(model)] + [(rows, model.heads.weight.detach().to(dtype))]
    shapes = {(count, size) for count, weight in work for size in weight.shape}
    inputs = {shape: torch.randn(shape, device=device).to(dtype) for shape in shapes}
    outputs = {shape: torch.empty(shape, device=device, dtype=dtype) for shape in shapes}
    gradients = [torch.empty_like(weight) for _, weight in work]

    def step() -> None:
        for (count, weight), gradient in zip(work, gradients, strict=True):
            wide, narrow = (count, weight.shape[0]), (count, weight.shape[1])
            torch.mm(inputs[narrow], weight.t(), out=outputs[wide])
            torch.mm(inputs[wide].t(), inputs[narrow], out=gradient)
            torch.mm(inputs[wide], weight, out=outputs[narrow])

    return step


def _truth(model: NTPSegModel, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The cross-entropy and its gradient of the head, in float32 by plain operators, one sample at a time."""
    count = int((labels[:, 1:] != -100).sum())
    head = model.heads.weight.detach().clone().requires_grad_()
    total = torch.zeros((), device=ids.device, dtype=torch.float64)
    for sample in range(len(ids)):
        with torch.no_grad():
            hidden = model(ids[sample : sample + 1]).last_hidden_state[0, :-1]
        target = labels[sample, 1:]
        keep = target != -100
        part = torch.nn.functional.cross_entropy(hidden[keep] @ head.t(), target[keep], reduction="sum") / count
        part.backward()
        total += part.detach()
    assert head.grad is not None
    return {"loss": total, "d_head": head.grad.double()}


def _check_finite(step: _Step) -> dict[str, float]:
    loss = float(step())
    if not math.isfinite(loss):
        raise Inaccurate({"loss": loss}, f"loss must be finite, got {loss}")
    return {}
