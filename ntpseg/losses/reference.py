"""The definition, restated in plain autograd: materialises every logit, takes any float dtype, hides nothing.

Source of the formulas: NTP-MRISeg (arXiv 2511.05044) for NTP, NkTP, TCL and HET; contrastive token loss
(arXiv 2205.02517) for the form of TCL. Row ``(b, t, j)`` is head j at position t and predicts position
``p = t + shift + j``; which rows and hard tokens count is defined in `ntpseg.losses.supervision`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ntpseg.losses.options import LossOptions, LossParts, TokenResults
from ntpseg.losses.supervision import Supervision, count_rows, counted_entries, shift_by_head
from ntpseg.losses.value_checks import raise_first
from ntpseg.utils.tensor_checks import has_data


def reference_loss(
    hidden: Tensor, weight: Tensor, supervision: Supervision, options: LossOptions, bias: Tensor | None = None
) -> tuple[Tensor, LossParts, TokenResults]:
    """The loss and its parts, one obvious step after another.

    Args:
        hidden: ``[B, T, k, D]`` float.
        weight: ``[V, D]`` or ``[k, V, D]``, the classes of ``options.vocab_range`` only.
        supervision: labels, hard tokens, token weights and counts.
        options: what is not a tensor.
        bias: ``[V]`` or ``[k, V]``, of the same classes as `weight`.

    Returns:
        The differentiable scalar loss, and detached parts and per-token results.

    Raises:
        ValueError: a value is not what `ntpseg.losses.value_checks` says.
    """
    batch, time, heads, _ = hidden.shape
    step = int(options.shift)
    low = options.vocab_range[0] if options.vocab_range else 0
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    labels, token_weights = supervision.labels, supervision.token_weights
    if has_data(labels):
        checked = None if supervision.signed_weights else token_weights
        raise_first(labels, checked, [supervision.num_rows, supervision.num_het], options, weight.shape[-2], work)

    if weight.dim() == 2:
        logits = torch.einsum("btkd,vd->btkv", hidden, weight).to(work)
    else:
        logits = torch.einsum("btkd,kvd->btkv", hidden, weight).to(work)

    logits = (logits if bias is None else logits + bias.to(work)) * options.logit_scale
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)

    target = shift_by_head(labels, heads, options.ignore_index, options).permute(1, 2, 0)
    supervised = target != options.ignore_index
    token_weight = supervised.to(work)
    if token_weights is not None:
        shifted = shift_by_head(token_weights.to(work), heads, 0.0, options).permute(1, 2, 0)
        token_weight = torch.where(supervised, shifted, 0.0)
    head_weights = torch.tensor(options.head_weights or (1.0,) * heads, dtype=work, device=hidden.device)
    row_weight = token_weight * head_weights
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
    position, token = supervision.het_position, supervision.het_token
    if position is not None and token is not None:
        classes = logits.shape[-1]
        counts = counted_entries(labels, position, token, options, classes)
        b = torch.arange(batch, device=hidden.device).unsqueeze(1)
        row, wrong = (position - step).clamp(0, time - 1), (token - low).clamp(0, classes - 1)
        gap = (logits[b, row, 0, wrong] - z_y[b, row, 0]) / options.temperature
        het = torch.where(counts, torch.logaddexp(gap, torch.zeros_like(gap)), 0.0).sum()
        entries = counts.sum().to(work)

    num_rows = supervision.num_rows
    rows = (count_rows(labels, heads, token_weights, options) if num_rows is None else num_rows).to(work)
    denominator = (rows * head_weights).sum()
    ntp = _ratio((token_weight * nll)[..., 0].sum(), rows[0])
    nktp = _ratio((row_weight * nll).sum(), denominator)
    tcl = _ratio((row_weight * tcl).sum(), denominator)
    z = _ratio((row_weight * lse.square()).sum(), denominator)
    het = _ratio(het, entries if supervision.num_het is None else supervision.num_het.to(work))

    cross_entropy = nktp
    if options.label_smoothing:  # a masked class has an infinite mean, and 0 * inf is not 0
        smooth = _ratio((row_weight * torch.where(supervised, lse - logits.mean(-1), 0.0)).sum(), denominator)
        cross_entropy = (1 - options.label_smoothing) * nktp + options.label_smoothing * smooth
    loss = cross_entropy + options.tcl_weight * tcl + options.het_weight * het
    if options.z_loss:
        loss = loss + options.z_loss * z
    parts = LossParts(ntp.detach(), nktp.detach(), tcl.detach(), het.detach(), z.detach())
    tokens = TokenResults(
        prediction=_by_target(torch.where(supervised, prediction + low, -1), step, -1),
        nll=_by_target(nll.detach(), step, 0),
        margin=_by_target(margin, step, 0),
    )
    return loss, parts, tokens


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
