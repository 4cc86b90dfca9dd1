"""Public API: `ntp_loss` and its module form `NTPLoss`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ntpseg.losses.arguments import check_operands, check_transforms, checked_counts, checked_shapes, merged_options
from ntpseg.losses.backends import choose_backend
from ntpseg.losses.fused import loss_op
from ntpseg.losses.logit_changes import append_bias, smoothing_term
from ntpseg.losses.options import LossOptions, LossParts, NTPOutput, NumItems, TokenResults
from ntpseg.losses.reference import reference_loss
from ntpseg.losses.supervision import Supervision
from ntpseg.losses.vocab_parallel import local_shards, shard_offset
from ntpseg.ops.loss import LossInputs, LossOutputs
from ntpseg.utils.tensor_checks import shown

if TYPE_CHECKING:
    from ntpseg.memory import HardTokens


def ntp_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    negatives: int = 5,
    tcl_weight: float = 1.0,
    het_weight: float = 1.0,
    het: HardTokens | None = None,
    temperature: float = 1.0,
    head_weights: Sequence[float] | None = None,
    ignore_index: int = -100,
    shift: bool = True,
    vocab_range: tuple[int, int] | None = None,
    num_items: NumItems | float | Tensor | None = None,
    backend: str = "auto",
    token_weights: Tensor | None = None,
    bias: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    options: LossOptions | None = None,
) -> NTPOutput:
    """Next-k-token cross-entropy with token-level contrastive and hard-error-token terms, without stored logits.

    ``loss = CE + tcl_weight * TCL + het_weight * HET`` after NTP-MRISeg (arXiv 2511.05044); TCL has the form of
    contrastive token loss (arXiv 2205.02517). Row ``(b, t, j)``, head j at position t, predicts the token at
    ``p = t + 1 + j`` and is supervised when ``p < T`` and ``labels[b, p] != ignore_index``. Inputs are never
    written to.

    Args:
        hidden: ``[B, T, k, D]`` float; ``[B, T, D]`` means k = 1. float64, float32, bfloat16 or float16.
        weight: ``[V, D]`` shared by the heads, or ``[k, V, D]``. Cast to the dtype of `hidden` if it differs. Under
            autocast both are cast to its dtype. Products accumulate in float32, so does the weight's gradient.
        labels: ``[B, T]`` int64, unshifted as in Hugging Face; T >= 1, while B may be 0.
        negatives: m; TCL's negatives are the same head's predictions at the m rows before, where supervised. More than
            T are as many as T.
        tcl_weight, het_weight: factors of the two terms.
        het: hard tokens ``[B, n]`` of the batch. An entry (p, e) counts when head 0's row of position p is
            supervised, e differs from its target and e is in the vocabulary range.
        temperature: tau of both terms.
        head_weights: k numbers w_j >= 0, default 1.
        ignore_index: label of an unsupervised position.
        shift: False: head j at position t predicts position ``t + j``.
        vocab_range: ``(lo, hi)``; softmax and arg-max see only these classes, and labels must lie in it.
        num_items: counts of the whole accumulated or global batch, see `ntpseg.losses.count_items`. A plain number N
            stands for ``NumItems(rows=[N] * k, het=N)``.
        backend: "reference", "torch", "triton" or "auto" (triton on CUDA, else torch).
        token_weights: ``[B, T]`` float, finite and >= 0 where there is a label, multiplies w_j for the rows that
            predict the position, in CE and TCL and in their denominators. Class weights c are ``c[labels]`` here, with
            the denominator of PyTorch's; with label smoothing PyTorch weighs the smoothed part class by class instead,
            which is another loss.
        bias: ``[V]`` or ``[k, V]``, added to the logits before scale and softcap. Costs a copy of the weight.
        group: ranks that share the vocabulary: `weight` is this rank's shard ``[V_rank, D]`` (or ``[k, V_rank, D]``),
            in the order of the ranks; every other argument is the same on all of them, ids count over the whole
            vocabulary, and each gets the whole gradient of `hidden`. All must want a gradient of `hidden` or none, and
            run on devices of one kind. Every call gathers the sizes of the shards, which synchronises. A weight that
            is a DTensor in ``Shard(0)`` over one mesh dimension brings its group along.
        options: all of the above that is no tensor, and more (`LossOptions`), in one object. Keywords that are
            also in it must then be left at their defaults.

    Returns:
        `NTPOutput`.

    Raises:
        ValueError: an argument is not as described, be it its type, its shape or its values; the message names it, what
            it was and what it must be. Values are checked where they are read anyway: on a GPU with the one copy to
            the host, and with ``LossOptions.max_rows``, where there is none, by assertions on the device, which end
            the process's use of it (as PyTorch's own do). The values of tensors on the meta device are not there.
    """
    settings = merged_options(
        options,
        negatives=negatives,
        tcl_weight=tcl_weight,
        het_weight=het_weight,
        temperature=temperature,
        head_weights=head_weights,
        ignore_index=ignore_index,
        shift=shift,
        vocab_range=vocab_range,
        backend=backend,
    )
    return evaluate(hidden, weight, labels, settings, het, num_items, token_weights, bias, group)


def autocast_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the products here: autocast's, where it is on and the operands are not float64."""
    kind = hidden.device.type
    if kind == "meta" or hidden.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return hidden.dtype
    return torch.get_autocast_dtype(kind)


def evaluate(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    settings: LossOptions,
    het: HardTokens | None = None,
    num_items: NumItems | float | Tensor | None = None,
    token_weights: Tensor | None = None,
    bias: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    *,
    signed_weights: bool = False,
) -> NTPOutput:
    """`ntp_loss` with its options merged; `signed_weights` are any numbers, such as an incoming gradient's."""
    check_transforms(hidden, weight)
    check_operands(hidden, weight)
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise ValueError(f"group must be a torch.distributed.ProcessGroup, got {shown(group)}")
    weight, bias, group = local_shards(weight, bias, group, hidden, labels)
    hidden = hidden.to(autocast_dtype(hidden))
    shard_start, vocabulary = 0, weight.shape[-2] if weight.dim() > 1 else 0
    if group is not None:
        shard_start, vocabulary = shard_offset(weight, group)
    hidden, weight, labels = checked_shapes(hidden, weight, labels, settings, het, token_weights, vocabulary, bias)
    num_rows, num_het = checked_counts(num_items, hidden)
    low, high = settings.vocab_range or (0, vocabulary)
    start, stop = max(low, shard_start), min(high, shard_start + weight.shape[-2])
    if (start, stop) != (shard_start, shard_start + weight.shape[-2]):
        first, count = min(start - shard_start, weight.shape[-2]), max(stop - start, 0)
        weight = weight.narrow(-2, first, count)
        bias = None if bias is None else bias.narrow(-1, first, count)
    weight = weight.to(hidden.dtype)
    name = choose_backend(settings.backend, hidden.device, settings.softcap)
    if group is not None and name == "reference":
        raise ValueError(f"backend must be torch, triton or auto where group is given, got {settings.backend!r}")
    if group is not None and settings.label_smoothing:
        raise ValueError(f"label_smoothing must be 0 where group is given, got {settings.label_smoothing}")
    supervision = Supervision(
        labels=labels,
        het_position=None if het is None else het.position,
        het_token=None if het is None else het.token,
        token_weights=None if token_weights is None else token_weights.detach(),
        num_rows=num_rows,
        num_het=num_het,
        signed_weights=signed_weights,
    )
    if name == "reference":
        loss, parts, tokens = reference_loss(hidden, weight, supervision, settings, bias)
    else:
        if bias is not None:
            hidden, weight = append_bias(hidden, weight, bias)
        if settings.logit_scale != 1:
            hidden = hidden * settings.logit_scale
        inputs = LossInputs(
            hidden,
            weight,
            *supervision,
            options=settings.with_backend(name).to_text(),
            hidden_grad=torch.is_grad_enabled() and hidden.requires_grad,
            weight_grad=torch.is_grad_enabled() and weight.requires_grad,
            group="" if group is None else group.group_name,
            class_start=max(start - low, 0),
            classes=high - low,
        )
        outputs = LossOutputs(*loss_op(*inputs))
        loss, parts = outputs.loss, LossParts(*outputs.parts.unbind())
        if settings.label_smoothing:
            loss = loss + smoothing_term(hidden, weight, supervision, settings)
        tokens = TokenResults(outputs.prediction, outputs.nll, outputs.margin)
    return NTPOutput.make(loss, parts, tokens, settings)


class NTPLoss(nn.Module):
    """`ntp_loss` as a module that holds its options.

    Args:
        options: a `LossOptions`, or
        **keywords: its fields one by one.

    Raises:
        ValueError: both are given, or a field is not as `LossOptions` describes.
    """

    def __init__(self, options: LossOptions | None = None, **keywords: Any) -> None:
        super().__init__()
        if options is not None and keywords:
            raise ValueError(f"options must be given without further keywords, got {', '.join(sorted(keywords))}")
        unknown = sorted(set(keywords) - set(LossOptions.__dataclass_fields__))
        if unknown:
            raise ValueError(f"options must be among {', '.join(LossOptions.__dataclass_fields__)}, got {unknown[0]!r}")
        if options is not None and not isinstance(options, LossOptions):
            raise ValueError(f"options must be a LossOptions, got {shown(options)}")
        self.options = options or LossOptions(**keywords)

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        het: HardTokens | None = None,
        num_items: NumItems | float | Tensor | None = None,
        token_weights: Tensor | None = None,
        bias: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> NTPOutput:
        """See `ntp_loss`."""
        return ntp_loss(
            hidden,
            weight,
            labels,
            het=het,
            num_items=num_items,
            token_weights=token_weights,
            bias=bias,
            group=group,
            options=self.options,
        )

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        default = LossOptions()
        return ", ".join(
            f"{name}={getattr(self.options, name)!r}"
            for name in LossOptions.__dataclass_fields__
            if getattr(self.options, name) != getattr(default, name)
        )
