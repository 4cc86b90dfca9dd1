"""The reference against the definition spelled out row by row, and against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from loss_cases import Case, draw

from ntpseg import NumItems


def by_hand(case: Case) -> dict[str, float]:
    """The definition in loops over single numbers."""
    options = case.options
    batch, time, k, _ = case.hidden.shape
    low, high = options.vocab_range or (0, case.weight.shape[-2])
    step = int(options.shift)
    w = options.head_weights or (1.0,) * k
    rows: dict[tuple[int, int, int], tuple[int, torch.Tensor]] = {}
    for b in range(batch):
        for t in range(time):
            for j in range(k):
                p = t + step + j
                if p < time and case.labels[b, p] != options.ignore_index:
                    matrix = case.weight if case.weight.dim() == 2 else case.weight[j]
                    rows[b, t, j] = int(case.labels[b, p]), matrix @ case.hidden[b, t, j]
    ce = tcl = total = ntp = first = 0.0
    for (b, t, j), (y, z) in rows.items():
        allowed = z[low:high]
        nll = float(allowed.logsumexp(0) - z[y])
        negatives = []
        for back in range(1, options.negatives + 1):
            if (b, t - back, j) in rows:
                guess = low + int(rows[b, t - back, j][1][low:high].argmax())
                if guess != y:
                    negatives.append(math.exp(float(z[guess] - z[y]) / options.temperature))
        ce += w[j] * nll
        tcl += w[j] * math.log1p(sum(negatives))
        total += w[j]
        if j == 0:
            ntp, first = ntp + nll, first + 1
    het, entries = 0.0, 0
    slots = case.tensors["het"]
    for b in range(batch):
        for p, e in zip(slots.position[b].tolist(), slots.token[b].tolist()):
            if p >= 0 and (b, p - step, 0) in rows and low <= e < high:
                y, z = rows[b, p - step, 0]
                if e != y:
                    het += math.log1p(math.exp(float(z[e] - z[y]) / options.temperature))
                    entries += 1
    parts = {"ntp": ntp / first, "nktp": ce / total, "tcl": tcl / total, "het": het / max(entries, 1)}
    parts["loss"] = parts["nktp"] + options.tcl_weight * parts["tcl"] + options.het_weight * parts["het"]
    return parts


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"per_head": True, "negatives": 2, "temperature": 0.5},
        {"shift": False, "head_weights": (1.0, 0.5, 0.0), "tcl_weight": 0.3, "het_weight": 2.0},
        {"vocab_range": (4, 13), "ignore_index": 0},
        {"k": 5, "time": 4, "negatives": 30},
    ],
    ids=["plain", "per-head", "unshifted", "range", "short"],
)
def test_reference_is_the_definition(seed: int, keywords: dict) -> None:
    case = draw(seed=seed, **keywords)
    out = case.loss(case.hidden, case.weight, "reference")
    for name, value in by_hand(case).items():
        assert float(getattr(out, name)) == pytest.approx(value, rel=1e-12, abs=1e-12), name


@pytest.mark.parametrize(
    "keywords",
    [{}, {"shift": False, "temperature": 0.7, "head_weights": (1.0, 0.5, 0.0)}, {"per_head": True, "num_items": 40}],
    ids=["plain", "unshifted", "per-head"],
)
def test_gradients_agree_with_finite_differences(keywords: dict) -> None:
    case = draw(1, 6, 3, 4, 7, slots=3, **keywords)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()

    def loss(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return case.loss(h, w, "reference").loss

    # the predictions are piecewise constant; steps this small do not cross an edge on these draws
    assert torch.autograd.gradcheck(loss, (hidden, weight), eps=1e-6, atol=1e-6)


def test_per_token_results_line_up_with_the_predicted_position() -> None:
    case = draw(2, 6, 2, 8, 11, unsupervised=0.4)
    out = case.loss(case.hidden, case.weight, "reference")
    for b in range(2):
        for p in range(6):
            if p == 0 or case.labels[b, p] == -100:
                assert (out.prediction[b, p], out.nll[b, p], out.margin[b, p]) == (-1, 0, 0)
                continue
            z = case.weight @ case.hidden[b, p - 1, 0]
            y = case.labels[b, p]
            assert out.prediction[b, p] == z.argmax()
            assert float(out.nll[b, p]) == pytest.approx(float(z.logsumexp(0) - z[y]))
            assert float(out.margin[b, p]) == pytest.approx(float(z.max() - z[y]))


def test_three_dimensional_hidden_means_one_head() -> None:
    case = draw(k=1)
    three = case.loss(case.hidden[:, :, 0], case.weight, "reference")
    four = case.loss(case.hidden, case.weight, "reference")
    assert torch.equal(three.loss, four.loss)
    assert torch.equal(three.ntp, three.nktp)


def test_num_items_replace_the_counts() -> None:
    case = draw(het_weight=0.5, tcl_weight=0.25, head_weights=(1.0, 0.5, 2.0))
    own = case.loss(case.hidden, case.weight, "reference")
    rows = [int((case.labels[:, 1 + j :] != -100).sum()) for j in range(3)]
    case.tensors["num_items"] = NumItems(rows, 6)
    same = case.loss(case.hidden, case.weight, "reference")
    assert torch.allclose(same.nktp, own.nktp) and torch.allclose(same.tcl, own.tcl)
    case.tensors["num_items"] = NumItems([2 * r for r in rows], 12)
    half = case.loss(case.hidden, case.weight, "reference")
    assert float(half.loss) == pytest.approx(float(same.loss) / 2)


def test_token_weights_are_weights_of_the_predicted_token() -> None:
    case = draw(k=2, slots=0, negatives=0, unsupervised=0.2)
    weights = torch.rand(2, 9, dtype=torch.float64)
    case.tensors["token_weights"] = weights
    out = case.loss(case.hidden, case.weight, "reference")
    total = mass = 0.0
    for b, p in (case.labels != -100).nonzero().tolist():
        for j in range(2):
            if p - 1 - j >= 0:
                z = case.weight @ case.hidden[b, p - 1 - j, j]
                total += float(weights[b, p] * (z.logsumexp(0) - z[case.labels[b, p]]))
                mass += float(weights[b, p])
    assert float(out.loss) == pytest.approx(total / mass)
