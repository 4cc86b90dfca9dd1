"""`F.cross_entropy` of a head's logits inside `fused_cross_entropy` is PyTorch's own, or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntpseg import ntp_loss
from ntpseg.losses.fused_cross_entropy import fused_cross_entropy

CLASSES = 23


def operands() -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, CLASSES, (3, 7))
    labels[0, :3] = -100
    return torch.randn(3, 7, 8, requires_grad=True), nn.Linear(8, CLASSES), labels


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "flattened": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()),
    "viewed": lambda z, y: F.cross_entropy(z.float().view(-1, z.size(-1)), y.view(-1)),
    "shifted": lambda z, y: F.cross_entropy(z[:, :-1].contiguous().view(-1, CLASSES), y[:, 1:].reshape(-1)),
    "of a module": lambda z, y: nn.CrossEntropyLoss(ignore_index=3)(z.reshape(-1, CLASSES), y.clamp_min(3).flatten()),
    "scaled": lambda z, y: F.cross_entropy((z * 0.3).flatten(0, -2), y.flatten()),
    "capped": lambda z, y: F.cross_entropy((torch.tanh(z / 2) * 2).flatten(0, 1), y.flatten()),
    "summed": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum"),
    "each": lambda z, y: (F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none") ** 2).sum(),
    "smooth": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), label_smoothing=0.2),
    "weighted": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), weight=torch.arange(1.0, 1 + CLASSES)),
    "two parts": lambda z, y: (
        F.cross_entropy(z[:1].flatten(0, 1), y[:1].flatten())
        + 0.1 * F.cross_entropy(z[1:, 2:5].flatten(0, 1), y[1:, 2:5].flatten())
    ),
    "transposed": lambda z, y: F.cross_entropy(z[:, :-1].transpose(1, 2), y[:, 1:]),
    "transposed from the end": lambda z, y: F.cross_entropy(torch.transpose(z.float(), -1, -2).contiguous(), y),
    "permuted": lambda z, y: F.cross_entropy((z * 0.3).permute(0, 2, 1), y, label_smoothing=0.1),
    "transposed, each": lambda z, y: (F.cross_entropy(z.permute((0, -1, 1)), y, reduction="none") ** 2)[:, 2:].sum(),
    "first classes": lambda z, y: F.cross_entropy(z[..., :11].flatten(0, 1), (y % 11).flatten()),
}


@pytest.mark.parametrize("way", WAYS)
def test_equals_pytorch(way: str) -> None:
    results = []
    for fused in (False, True):
        hidden, head, labels = operands()
        if fused:
            with fused_cross_entropy(head, negatives=0) as found:
                loss = WAYS[way](head(hidden), labels)
            assert "forward" not in vars(head)
            assert bool(found) == ("each" not in way)
        else:
            loss = WAYS[way](head(hidden), labels)
        results.append([loss, *torch.autograd.grad(loss, [hidden, head.weight, head.bias])])
    for one, other in zip(*results):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_negatives_are_those_of_the_same_row() -> None:
    hidden, head, labels = operands()
    with fused_cross_entropy(head, negatives=3) as found:
        loss = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten())
    truth = ntp_loss(hidden, head.weight, labels, bias=head.bias, shift=False, negatives=3, backend="reference")
    assert float(loss.detach()) == pytest.approx(float(truth.loss.detach()), rel=1e-5)
    assert float(found[0].tcl) > 0
    assert torch.equal(found[0].prediction, truth.prediction)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda z, y: z.softmax(-1), "got .softmax of them"),
        (lambda z, y: F.cross_entropy(z.flatten(0, 1), torch.rand(21, CLASSES)), "target must be an int64"),
        (lambda z, y: F.cross_entropy(z.flatten(0, 1)[y.flatten() > 0], y[y > 0]), "indices into the flattened"),
        (lambda z, y: z.transpose(0, 1), r"\.transpose\(0, 1\) of them"),
        (lambda z, y: z.permute(2, 0, 1), r"\.permute\(2, 0, 1\) of them"),
        (lambda z, y: z.transpose(1, 2).transpose(1, 2), r"\.transpose\(1, 2\) of them"),
        (lambda z, y: z.transpose(1, 2).reshape(-1, CLASSES), "of the transposed ones"),
        (lambda z, y: z.transpose(1, 2)[:, :3], "indices into the transposed ones"),
        (lambda z, y: z.transpose(1, 2).logsumexp(2), "logsumexp over dimension 2"),
        (lambda z, y: F.cross_entropy(z.transpose(1, 2), y.T), r"target must be \[3, 7\] for \[3, 23, 7\] logits, got"),
        (lambda z, y: F.cross_entropy(z, y), r"must be \[N, V\] or \[B, V, T\] in F.cross_entropy, got \[3, 7, 23\]"),
        (lambda z, y: z.exp(), r"^the head's logits must go to F\.cross_entropy, .* got \.exp of them"),
        (lambda z, y: F.nll_loss(z, y), "torch's nll_loss"),
        (lambda z, y: torch.cat([z, z]), "torch's cat of them"),
        (lambda z, y: z + torch.ones(()), r"__add__ on them"),
        (lambda z, y: z.view(7, -1), r"\.view\(7, -1\)"),
    ],
)
def test_refused(use: Callable[[Any, Tensor], Any], message: str) -> None:
    hidden, head, labels = operands()
    with pytest.raises(ValueError, match=message), fused_cross_entropy(head, negatives=0):
        use(head(hidden), labels)
    assert isinstance(head(hidden), Tensor)


def test_refused_losses_per_token_with_negatives() -> None:
    hidden, head, labels = operands()
    with pytest.raises(ValueError, match="must be 0 with reduction='none'"), fused_cross_entropy(head):
        F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="none")


def test_one_head_is_in_one_context_at_a_time() -> None:
    hidden, head, labels = operands()
    with fused_cross_entropy(head, negatives=0) as found:
        with (
            pytest.raises(ValueError, match=r"^head must be in one fused_cross_entropy at a time .* got one that is"),
            fused_cross_entropy(head, negatives=5),
        ):
            pass
        F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten())
    assert len(found) == 1
    assert isinstance(head(hidden), Tensor)
