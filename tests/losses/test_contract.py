"""The traps that fused losses fall into (DESIGN, section 1), one test each, for both backends of this machine."""

from __future__ import annotations

import pytest
import torch
from loss_cases import draw, error

from ntpseg import HardTokens, NTPLoss, NumItems, ntp_loss
from ntpseg.losses import LossOptions

pytestmark = pytest.mark.parametrize("backend", ["reference", "torch"])


def test_frozen_weight_still_gives_the_hidden_gradient(backend: str) -> None:
    case = draw()
    _, full, _ = case.run(backend)
    hidden = case.hidden.clone().requires_grad_()
    case.loss(hidden, case.weight, backend).loss.backward()
    assert torch.allclose(hidden.grad, full)
    assert case.weight.grad is None


def test_frozen_hidden_still_gives_the_weight_gradient(backend: str) -> None:
    case = draw()
    _, _, full = case.run(backend)
    weight = case.weight.clone().requires_grad_()
    case.loss(case.hidden, weight, backend).loss.backward()
    assert torch.allclose(weight.grad, full)


def test_needs_no_gradient_at_all(backend: str) -> None:
    case = draw()
    with torch.no_grad():
        silent = case.loss(case.hidden.clone().requires_grad_(), case.weight, backend)
    assert not silent.loss.requires_grad
    assert torch.equal(silent.loss, case.loss(case.hidden, case.weight, backend).loss)


def test_second_backward_and_scaling(backend: str) -> None:
    case = draw()
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    loss = case.loss(hidden, weight, backend).loss
    loss.backward(retain_graph=True)
    once = hidden.grad.clone(), weight.grad.clone()
    (3 * loss).backward()
    assert torch.allclose(hidden.grad, 4 * once[0])
    assert torch.allclose(weight.grad, 4 * once[1])


def test_only_the_loss_carries_a_gradient(backend: str) -> None:
    case = draw()
    out = case.loss(case.hidden.requires_grad_(), case.weight, backend)
    assert out.loss.requires_grad
    for name in ("ntp", "nktp", "tcl", "het", "prediction", "nll", "margin"):
        assert not getattr(out, name).requires_grad, name


def test_never_writes_a_callers_tensor(backend: str) -> None:
    case = draw(weighted=True, num_items=torch.tensor(9.0))
    tensors = [case.hidden, case.weight, case.labels, case.tensors["het"].position, case.tensors["het"].token]
    tensors += [case.tensors["token_weights"], case.tensors["num_items"]]
    before = [tensor.clone() for tensor in tensors]
    case.hidden.requires_grad_()
    case.loss(case.hidden, case.weight, backend).loss.backward()
    assert all(torch.equal(one, other) for one, other in zip(tensors, before))


@pytest.mark.parametrize("shift", [True, False])
def test_no_supervised_row_gives_zero_tied_to_all_inputs(backend: str, shift: bool) -> None:
    case = draw(unsupervised=1.0, shift=shift)
    out, d_hidden, d_weight = case.run(backend)
    assert float(out.loss.detach()) == 0
    assert not d_hidden.any() and not d_weight.any()
    assert (out.prediction == -1).all() and not out.nll.any() and not out.margin.any()


def test_a_call_without_rows_adds_nothing_to_an_accumulated_batch(backend: str) -> None:
    case = draw(unsupervised=1.0, num_items=NumItems([5, 5, 5], 3))
    assert float(case.run(backend)[0].loss.detach()) == 0
    case = draw(num_items=0)
    out, d_hidden, _ = case.run(backend)
    assert float(out.loss.detach()) == 0 and not d_hidden.any()


def test_unsupervised_rows_are_never_read(backend: str) -> None:
    if backend == "reference":
        pytest.skip("the reference multiplies every row")
    case = draw(k=1, slots=0)
    clean, d_clean, _ = case.run(backend)
    supervised = torch.zeros(2, 9, dtype=torch.bool)
    supervised[:, :-1] = case.labels[:, 1:] != -100
    case.hidden[~supervised] = torch.nan
    result, d_found, d_weight = case.run(backend)
    assert torch.equal(clean.loss, result.loss) and torch.equal(d_clean, d_found) and d_weight.isfinite().all()


def test_accumulation_equals_one_large_batch(backend: str) -> None:
    case = draw(6, 11, 3, slots=5, head_weights=(1.0, 0.5, 0.25), tcl_weight=0.5)
    whole, d_hidden, d_weight = case.run(backend)
    rows = [int((case.labels[:, 1 + j :] != -100).sum()) for j in range(3)]
    het = case.tensors["het"]
    b = torch.arange(6).unsqueeze(1)
    target = case.labels[b, het.position.clamp_min(0)]
    entries = int(((het.position > 0) & (target != -100) & (target != het.token)).sum())
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    total = 0.0
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        out = ntp_loss(
            hidden[part],
            weight,
            case.labels[part],
            het=HardTokens(het.position[part], het.token[part]),
            num_items=NumItems(rows, entries),
            options=case.options.with_backend(backend),
        )
        out.loss.backward()
        total += float(out.loss.detach())
    assert total == pytest.approx(float(whole.loss.detach()))
    assert error(hidden.grad, d_hidden) < 1e-13 and error(weight.grad, d_weight) < 1e-13


def test_one_number_of_items_stands_for_every_count(backend: str) -> None:
    one = draw(num_items=13).run(backend)
    many = draw(num_items=NumItems(torch.tensor([13, 13, 13]), torch.tensor(13))).run(backend)
    assert torch.equal(one[0].loss, many[0].loss) and torch.equal(one[2], many[2])


def test_non_contiguous_inputs(backend: str) -> None:
    case = draw(k=3, width=8)
    whole, d_hidden, d_weight = case.run(backend)
    hidden = case.hidden.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    weight = case.weight.t().contiguous().t()
    labels = case.labels.t().contiguous().t()
    assert not (hidden.is_contiguous() or weight.is_contiguous() or labels.is_contiguous())
    case.hidden, case.weight, case.labels = hidden, weight, labels
    result, *grads = case.run(backend)
    assert torch.allclose(whole.loss, result.loss)
    assert torch.allclose(grads[0], d_hidden) and torch.allclose(grads[1], d_weight)


def test_autocast_rounds_the_operands_and_keeps_their_gradients_dtype(backend: str) -> None:
    case = draw(dtype=torch.float32, k=1, classes=64, width=32)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = case.loss(hidden, weight, backend).loss
    loss.backward()
    assert loss.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    rounded = case.loss(hidden.bfloat16(), weight.bfloat16(), backend).loss
    assert float(loss.detach()) == pytest.approx(float(rounded.detach()), rel=1e-5)
    exact = draw(dtype=torch.float32, k=1, classes=64, width=32).run("reference", torch.float64)
    assert error(hidden.grad, exact[1]) < 0.02 and error(weight.grad, exact[2]) < 0.02


def test_a_float32_master_weight_serves_bfloat16_states(backend: str) -> None:
    case = draw(dtype=torch.bfloat16, classes=64)
    weight = case.weight.float().requires_grad_()
    case.loss(case.hidden, weight, backend).loss.backward()
    _, _, d_weight = case.run(backend)
    assert weight.grad.dtype == torch.float32
    assert error(weight.grad, d_weight) < 5e-3


def test_float16_gradients_survive_a_loss_scale(backend: str) -> None:
    if backend == "reference":
        pytest.skip("a trap of gradients that are made before the scale is known")
    case = draw(4, 200, 1, 8, 50, slots=0, scale=0.01, num_items=4_000_000)
    hidden, weight = case.hidden.half().requires_grad_(), case.weight.half().requires_grad_()
    (case.loss(hidden, weight, backend).loss * 2.0**20).backward()
    case.hidden, case.weight = hidden.detach().double(), weight.detach().double()
    _, d_hidden, d_weight = case.run("reference")
    assert error(hidden.grad, d_hidden * 2**20) < 2e-3
    assert error(weight.grad, d_weight * 2**20) < 2e-3


def test_vocab_range_restricts_classes_and_gradient(backend: str) -> None:
    case = draw(vocab_range=(4, 13))
    out, d_hidden, d_weight = case.run(backend)
    assert not d_weight[:4].any() and not d_weight[13:].any() and d_weight[4:13].any()
    seen = out.prediction[out.prediction >= 0]
    assert ((seen >= 4) & (seen < 13)).all()
    case.weight[:4] = 100.0
    assert torch.equal(case.run(backend)[1], d_hidden)


def test_ties_go_to_the_lowest_class(backend: str) -> None:
    case = draw(k=1, classes=12, width=4)
    case.weight[7] = case.weight[2]
    case.weight[2:8] *= 0.0
    out, *_ = case.run(backend)
    assert not ((out.prediction > 2) & (out.prediction < 8)).any()
    case.weight *= 0.0
    out, *_ = case.run(backend)
    assert (out.prediction[case.labels[:, :] != -100][1:] <= 0).all()
    assert not out.margin.any()


def test_margin_is_zero_exactly_where_the_prediction_is_right(backend: str) -> None:
    case = draw(3, 40, 1, 4, 3, dtype=torch.float32)
    out, *_ = case.run(backend)
    seen = out.prediction >= 0
    right = out.prediction == case.labels
    assert right[seen].any() and (~right[seen]).any()
    assert torch.equal(out.margin[seen] == 0, right[seen])


def test_per_head_results(backend: str) -> None:
    case = draw(per_head=True, shift=False)
    plain, *_ = case.run(backend)
    case.options = LossOptions(shift=False, per_head=True)
    out, *_ = case.run(backend)
    assert plain.head_nll is None
    assert torch.equal(out.head_prediction[..., 0], out.prediction) and torch.equal(out.head_nll[..., 0], out.nll)
    for j in range(3):
        assert (out.head_prediction[:, :j, j] == -1).all()
        assert (out.head_prediction[:, j:, j] >= 0).eq(case.labels[:, j:] != -100).all()


def test_z_loss_is_the_mean_squared_log_partition(backend: str) -> None:
    case = draw(k=1, slots=0, negatives=0, z_loss=0.1)
    out, *_ = case.run(backend)
    z = case.hidden[:, :-1, 0] @ case.weight.t()
    mean = z.logsumexp(-1)[case.labels[:, 1:] != -100].square().mean()
    assert float(out.z) == pytest.approx(float(mean))
    assert float(out.loss.detach()) == pytest.approx(float(out.ntp + 0.1 * mean))


def test_module_form(backend: str) -> None:
    case = draw(negatives=2, temperature=0.5)
    module = NTPLoss(negatives=2, temperature=0.5, backend=backend)
    out = module(case.hidden, case.weight, case.labels, het=case.tensors["het"])
    assert torch.equal(out.loss, case.loss(case.hidden, case.weight, backend).loss)
    assert "negatives=2" in repr(module) and "tcl_weight" not in repr(module)


def test_checkpointing_gives_the_same_gradient(backend: str) -> None:
    case = draw()
    _, full, _ = case.run(backend)
    hidden = case.hidden.clone().requires_grad_()
    loss = torch.utils.checkpoint.checkpoint(
        lambda h: case.loss(h, case.weight, backend).loss, hidden, use_reentrant=False
    )
    loss.backward()
    assert torch.allclose(hidden.grad, full)
