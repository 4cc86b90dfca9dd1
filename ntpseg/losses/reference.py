"""The definition, restated in plain autograd: materialises every logit, takes any float dtype, hides nothing.

Source of the formulas: NTP-MRISeg (arXiv 2511.05044) for NTP, NkTP, TCL and HET; contrastive token loss
(arXiv 2205.02517) for the form of TCL. Row ``(b, t, j)`` is head j at position t and predicts position
``p = t + shift + j``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ntpseg.losses.options import LossOptions


def reference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    options: LossOptions,
    *,
    het_position: Tensor | None = None,
    het_token: Tensor | None = None,
    token_weights: Tensor | None = None,
    num_rows: Tensor | None = None,
    num_het: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its parts, one obvious step after another.

    Args:
        hidden: ``[B, T, k, D]`` float.
        weight: ``[V, D]`` or ``[k, V, D]``, the classes of ``options.vocab_range`` only.
        labels: ``[B, T]`` int64, ids of the whole vocabulary.
        options: what is not a tensor.
        het_position, het_token: ``[B, n]`` int64 or None.
        token_weights: ``[B, T]`` or None, by the position of the predicted token.
        num_rows: ``[k]`` float or None, replaces the row counts.
        num_het: 0-dim float or None, replaces the entry count.

    Returns:
        The differentiable scalar loss, and detached ``ntp, nktp, tcl, het, z`` (0-dim) and ``prediction, nll,
        margin`` (``[B, T, k]``, by the position of the predicted token).
    """
    batch, time, heads, _ = hidden.shape
    step = 1 if options.shift else 0
    low = options.vocab_range[0] if options.vocab_range else 0
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32

    if weight.dim() == 2:
        logits = torch.einsum("btkd,vd->btkv", hidden, weight).to(work)
    else:
        logits = torch.einsum("btkd,kvd->btkv", hidden, weight).to(work)

    target = labels.new_full((batch, time, heads), options.ignore_index)
    share = logits.new_zeros(batch, time, heads)
    for j in range(heads):
        n = max(time - step - j, 0)
        target[:, :n, j] = labels[:, step + j : step + j + n]
        share[:, :n, j] = 1.0 if token_weights is None else token_weights[:, step + j : step + j + n].to(work)
    supervised = target != options.ignore_index
    share = share * supervised
    head_weights = torch.tensor(options.head_weights or (1.0,) * heads, dtype=work, device=hidden.device)
    row_weight = share * head_weights
    y = torch.where(supervised, target - low, 0)

    z_y = logits.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    lse = logits.logsumexp(-1)
    nll = torch.where(supervised, lse - z_y, 0.0)
    z_max, prediction = logits.detach().max(-1)
    margin = torch.where(supervised, z_max - z_y.detach(), 0.0)

    gaps = [torch.zeros_like(nll)]
    for back in range(1, min(options.negatives, time - 1) + 1):
        negative = prediction[:, :-back]
        exists = supervised[:, :-back] & supervised[:, back:] & (negative != y[:, back:])
        gap = logits[:, back:].gather(-1, negative.unsqueeze(-1)).squeeze(-1) - z_y[:, back:]
        gap = torch.where(exists, gap / options.temperature, -torch.inf)
        gaps.append(torch.nn.functional.pad(gap, (0, 0, back, 0), value=-torch.inf))
    tcl = torch.stack(gaps, -1).logsumexp(-1)  # log(1 + sum exp): the leading zero is the one

    het = torch.zeros((), dtype=work, device=hidden.device)
    entries = torch.zeros((), dtype=work, device=hidden.device)
    if het_position is not None and het_token is not None:
        row = (het_position - step).clamp(0, time - 1)
        wrong = (het_token - low).clamp(0, logits.shape[-1] - 1)
        b = torch.arange(batch, device=hidden.device).unsqueeze(1)
        counts = (het_position >= step) & (het_position < time) & supervised[b, row, 0]
        counts &= (wrong == het_token - low) & (wrong != y[b, row, 0])
        gap = (logits[b, row, 0, wrong] - z_y[b, row, 0]) / options.temperature
        het = torch.where(counts, torch.logaddexp(gap, torch.zeros_like(gap)), 0.0).sum()
        entries = counts.sum().to(work)

    rows = share.sum((0, 1)) if num_rows is None else num_rows.to(work)
    denominator = (rows * head_weights).sum()
    ntp = _ratio((share * nll)[..., 0].sum(), rows[0])
    nktp = _ratio((row_weight * nll).sum(), denominator)
    tcl = _ratio((row_weight * tcl).sum(), denominator)
    z = _ratio((row_weight * lse.square()).sum(), denominator)
    het = _ratio(het, entries if num_het is None else num_het.to(work))

    loss = nktp + options.tcl_weight * tcl + options.het_weight * het
    if options.z_loss:
        loss = loss + options.z_loss * z
    parts = {"ntp": ntp, "nktp": nktp, "tcl": tcl, "het": het, "z": z}
    tokens = {
        "prediction": _by_target(torch.where(supervised, prediction + low, -1), step, -1),
        "nll": _by_target(nll, step, 0),
        "margin": _by_target(margin, step, 0),
    }
    return loss, {name: value.detach() for name, value in (parts | tokens).items()}


def _ratio(total: Tensor, count: Tensor) -> Tensor:
    """``total / count``, and 0 still tied to the inputs where there is nothing to count."""
    return torch.where(count > 0, total / torch.where(count > 0, count, 1.0), 0.0 * total)


def _by_target(rows: Tensor, step: int, empty: int) -> Tensor:
    """Moves head j's row t to the position ``t + step + j`` that it predicts."""
    moved = torch.full_like(rows, empty)
    time = rows.shape[1]
    for j in range(rows.shape[2]):
        n = max(time - step - j, 0)
        moved[:, step + j : step + j + n, j] = rows[:, :n, j]
    return moved
