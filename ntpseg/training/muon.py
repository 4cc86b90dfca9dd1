"""Muon: momentum whose matrices are orthogonalised, and AdamW for everything else, in one optimizer.

Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the nearest matrix with
orthonormal rows or columns, so that every direction of a weight learns at one rate. ``torch.optim.Muon`` takes
two-dimensional weights alone and iterates in bfloat16, which takes seconds a step on a CPU without units for it; this
one takes convolutions too (flattened to ``[out, in * height * width]``) and iterates in the weight's dtype.

The iteration is Newton-Schulz with the coefficients of Polar Express (Amsel et al., arXiv 2505.16932), on the Gram
matrix: with ``G = X X^T`` the iterate is ``X_k = Q_k X``, so all but two products are of the size of the smaller side.
For a 3x3 convolution, nine times as wide as high, that is a third of the operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from ntpseg.utils.checks import check_number

# a, b, c of each iteration: p(X) = a X + b (X X^T) X + c (X X^T)^2 X.
_COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
# The polynomials converge from singular values up to 1; rounding must not lift one above.
_SAFETY = 1.01
# Matrices with a smaller side than this are left to AdamW: their rows are too few for directions to matter.
MIN_SIDE = 8


def orthogonalize(matrices: Tensor) -> Tensor:
    """The polar factors of matrices, to 12.5 % in their singular values above a thousandth of the Frobenius norm.

    Args:
        matrices: ``[N, m, n]`` with m <= n, float32 or float64.

    Returns:
        ``[N, m, n]`` with nearly orthonormal rows; zero matrices stay zero.
    """
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) * _SAFETY).clamp_min(1e-7)
    gram = x @ x.mT
    product: Tensor | None = None
    for step, (a, b, c) in enumerate(_COEFFICIENTS):
        # One iteration multiplies X from the left by this polynomial of the Gram matrix.
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if step + 1 < len(_COEFFICIENTS):
            gram = factor @ gram @ factor
    assert product is not None
    return product @ x


class Muon(AdamW):
    """Muon for the parameter groups with ``"muon": True``, AdamW for the others.

    Args:
        groups: parameter groups with "params" and, optionally, "muon", "lr" and "weight_decay".
        lr: learning rate of AdamW.
        muon_lr: learning rate of Muon; a matrix moves by it times ``sqrt(max(1, rows / columns))``.
        momentum: of Muon, in Nesterov's form.
        **options: of `torch.optim.AdamW`.

    Raises:
        ValueError: a number out of range, or a Muon parameter with fewer than two dimensions.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        muon_lr: float = 0.02,
        momentum: float = 0.95,
        **options: Any,
    ) -> None:
        check_number("muon_lr", muon_lr, 0)
        check_number("momentum", momentum, 0, below=1)
        made = [{"muon": False, "momentum": momentum, **group} for group in groups]
        for group in made:
            group.setdefault("lr", muon_lr if group["muon"] else lr)
            narrow = [p for p in group["params"] if group["muon"] and p.dim() < 2]
            if narrow:
                raise ValueError(f"muon parameters must have 2 dimensions or more, got {list(narrow[0].shape)}")
        super().__init__(made, lr=lr, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """One step; parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients: list[tuple[nn.Parameter, Tensor]] = []
        for group in self.param_groups:
            if group["muon"]:
                gradients += self._muon(group)
        # AdamW passes over parameters that have no gradient.
        for parameter, _ in gradients:
            parameter.grad = None
        super().step()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        return loss

    def _muon(self, group: dict[str, Any]) -> list[tuple[nn.Parameter, Tensor]]:
        pairs = [(p, p.grad) for p in group["params"] if p.grad is not None]
        if not pairs:
            return []
        parameters, gradients = [p for p, _ in pairs], [g for _, g in pairs]
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                # AdamW looks for "step" in every state that it loads.
                self.state[parameter].update(step=torch.tensor(0.0), momentum=torch.zeros_like(parameter))
        torch._foreach_add_([self.state[p]["step"] for p in parameters], 1.0)
        buffers = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, buffers, group["momentum"])
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        # Matrices of one shape go through the iteration together.
        shapes: dict[Any, list[int]] = {}
        for index, update in enumerate(updates):
            sides = sorted((update.shape[0], update[0].numel()))
            shapes.setdefault((*sides, update.dtype, update.device), []).append(index)
        for members in shapes.values():
            turned = orthogonalize(torch.stack([_wide(updates[i]) for i in members]))
            for index, matrix in zip(members, turned):
                parameter = parameters[index]
                rows, columns = parameter.shape[0], parameter[0].numel()
                update = (matrix if rows <= columns else matrix.mT).reshape(parameter.shape)
                parameter.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
        return pairs


def _wide(update: Tensor) -> Tensor:
    matrix = update.reshape(update.shape[0], -1)
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Matrices for Muon, other weights, and weights without decay (biases, norms, tables of embeddings).

    Muon gets the linear layers and convolutions inside the model. The output matrix, embeddings and whatever reads out
    pixels go to AdamW, since their rows are classes or pixels, not directions of a common space; so do the k heads'
    transforms, which are several matrices in one tensor.
    """
    outside = ("heads.", "embed_tokens", "grid.", "draft.", ".film.", "caption.project")
    matrices, decayed, plain = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        sides = (parameter.shape[0], parameter[0].numel()) if parameter.dim() >= 2 else (0, 0)
        is_bias = parameter.dim() < 2 or name.endswith("bias")
        if is_bias or "embed_tokens" in name or name.startswith("grid."):
            plain.append(parameter)
        elif min(sides) < MIN_SIDE or any(part in name for part in outside):
            decayed.append(parameter)
        else:
            matrices.append(parameter)
    return matrices, decayed, plain
