"""What a model does to its logits, put into terms that every backend knows: bias, scale, label smoothing.

All three are linear in the logits, so they need no kernel: a bias is one more feature of the hidden states that is
always one, a scale is a factor of them, and label smoothing adds ``epsilon * (z[y] - mean z)``, whose mean over the
classes is a product with the mean row of the weight. Where they are off nothing is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ntpseg.losses.options import LossOptions
from ntpseg.losses.supervision import Supervision, count_rows, filled, shift_by_head

_FEATURES = 16  # added at once: kernels want rows that start at multiples of 32 bytes


def append_bias(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and weight whose products are ``hidden @ weight.T + bias``.

    Costs a copy of both. In a low precision the bias is rounded to that of the weight.

    Args:
        hidden: ``[B, T, k, D]``.
        weight: ``[V, D]`` or ``[k, V, D]``.
        bias: ``[V]`` or ``[k, V]``.

    Returns:
        ``[..., D + 16]`` each.
    """
    ones = F.pad(torch.ones_like(hidden[..., :1]), (0, _FEATURES - 1))
    column = F.pad(bias.to(weight.dtype).unsqueeze(-1), (0, _FEATURES - 1))
    return torch.cat([hidden, ones], -1), torch.cat([weight, column], -1)


def smoothing_term(hidden: Tensor, weight: Tensor, supervision: Supervision, options: LossOptions) -> Tensor:
    """What ``options.label_smoothing`` adds to the cross-entropy of `ntpseg.ntp_loss`, with its gradient.

    Costs two products of ``[B, T, k, D]`` with as much, in float32 (float64 for float64), and one pass over the weight.

    Args:
        hidden: ``[B, T, k, D]``.
        weight: ``[V, D]`` or ``[k, V, D]``, the classes of ``options.vocab_range`` only.
        supervision, options: as a backend gets them.

    Returns:
        0-dim: ``epsilon * sum_r g_r (z_r[y_r] - mean_v z_r[v])`` with the rows' weights g_r in the cross-entropy.
    """
    heads = hidden.shape[2]
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    low = options.vocab_range[0] if options.vocab_range else 0
    target = shift_by_head(supervision.labels, heads, options.ignore_index, options).permute(1, 2, 0)
    supervised = target != options.ignore_index
    row_weight = supervised.to(work)
    if supervision.token_weights is not None:
        shifted = shift_by_head(supervision.token_weights.to(work), heads, 0.0, options).permute(1, 2, 0)
        row_weight = torch.where(supervised, shifted, 0.0)
    head_weights = filled(options.head_weights or (1.0,) * heads, work, hidden.device)
    rows = supervision.num_rows
    if rows is None:
        rows = count_rows(supervision.labels, heads, supervision.token_weights, options)
    denominator = (rows.to(work) * head_weights).sum()

    y = torch.where(supervised, target - low, 0)
    if weight.dim() == 2:
        row = weight[y]
    else:
        row = weight[torch.arange(heads, device=y.device), y]
    mean = weight.to(work).mean(-2)
    gap = (hidden.to(work) * (row.to(work) - mean)).sum(-1)
    total = (row_weight * head_weights * gap).sum()
    return options.label_smoothing * torch.where(denominator > 0, total / denominator.clamp_min(1e-30), 0.0 * total)
