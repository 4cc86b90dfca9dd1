"""``ntp_loss`` on a GPU: the contract over the Triton backend, torch.compile, and a whole step in a CUDA graph."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from ntpseg import HardTokens, NTPOutput, ntp_loss
from ntpseg.kernels import chunks, memory
from ntpseg.losses import LossOptions

pytestmark = pytest.mark.gpu


def _inputs(
    dtype: torch.dtype = torch.bfloat16, k: int = 2, per_head: bool = False, classes: int = 3001
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, HardTokens]:
    make = torch.Generator("cuda").manual_seed(0)
    batch, time, width = 3, 130, 256
    hidden = torch.randn(batch, time, k, width, device="cuda", generator=make).to(dtype).requires_grad_()
    shape = (k, classes, width) if per_head else (classes, width)
    weight = (torch.randn(shape, device="cuda", generator=make) * 0.2).to(dtype).requires_grad_()
    labels = torch.randint(1000, 2000, (batch, time), device="cuda", generator=make)
    labels[:, :40] = -100
    het = HardTokens(
        torch.randint(-1, time, (batch, 8), device="cuda", generator=make),
        torch.randint(1000, 2000, (batch, 8), device="cuda", generator=make),
    )
    return hidden, weight, labels, het


def _step(
    backend: str, inputs: tuple, options: LossOptions, dtype: torch.dtype | None = None
) -> tuple[NTPOutput, torch.Tensor, torch.Tensor]:
    hidden, weight, labels, het = inputs
    hidden = hidden.detach().to(dtype or hidden.dtype).requires_grad_()
    weight = weight.detach().to(dtype or weight.dtype).requires_grad_()
    out = ntp_loss(hidden, weight, labels, het=het, options=options.with_backend(backend))
    out.loss.backward()
    return out, hidden.grad, weight.grad


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        LossOptions(),
        LossOptions(vocab_range=(1000, 2000)),
        LossOptions(max_rows=300),
        LossOptions(head_weights=(0.0, 1.0), temperature=0.7, z_loss=1e-3),
        LossOptions(shift=False, negatives=0),
        LossOptions(chunk_bytes=3008 * 2 * 100),
    ],
    ids=str,
)
def test_contract(options: LossOptions, per_head: bool) -> None:
    inputs = _inputs(per_head=per_head)
    expected, *truth = _step("reference", inputs, options, torch.float64)
    result, *got = _step("triton", inputs, options)
    for part in ("loss", "ntp", "nktp", "tcl", "het"):
        torch.testing.assert_close(
            getattr(result, part).double(), getattr(expected, part), rtol=1e-5, atol=1e-6, msg=part
        )
    assert (result.prediction == expected.prediction).float().mean() > 0.999
    for ours, exact in zip(got, truth, strict=True):
        # a prediction that ties within fp32 rounding may change a negative: allow a little beside the roundings
        assert float((ours.double() - exact).norm() / exact.norm()) < 3.5e-3


def test_auto_is_triton() -> None:
    inputs = _inputs()
    auto, triton = _step("auto", inputs, LossOptions()), _step("triton", inputs, LossOptions())
    assert torch.equal(auto[0].loss, triton[0].loss) and torch.equal(auto[2], triton[2])


def test_agrees_with_the_torch_backend() -> None:
    inputs = _inputs(torch.float32)
    ours, theirs = _step("triton", inputs, LossOptions()), _step("torch", inputs, LossOptions())
    torch.testing.assert_close(ours[0].loss, theirs[0].loss, rtol=1e-5, atol=1e-6)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-4


def test_compiles_without_a_break() -> None:
    hidden, weight, labels, het = _inputs()

    def step(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ntp_loss(hidden * 1.0, weight, labels, het=het).loss * 2.0

    compiled = torch.compile(step, fullgraph=True)
    gradients = []
    for function in (step, compiled):
        hidden.grad = weight.grad = None
        function(hidden, weight).backward()
        gradients.append((hidden.grad, weight.grad))
    for eager, fused in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, fused)


def test_a_step_in_a_cuda_graph() -> None:
    hidden, weight, labels, het = _inputs()
    options = LossOptions(max_rows=300, backend="triton")  # a fixed number of rows: nothing is counted on the host

    def step() -> torch.Tensor:
        hidden.grad = weight.grad = None
        out = ntp_loss(hidden, weight, labels, het=het, options=options)
        out.loss.backward()
        # the loss's graph would keep nodes of the leaves that belong to the default stream, which a capture refuses
        return out.loss.detach()

    expected = step().clone()
    wanted_hidden, wanted_weight = hidden.grad.clone(), weight.grad.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(loss, expected)
    assert torch.equal(hidden.grad, wanted_hidden) and torch.equal(weight.grad, wanted_weight)


@pytest.fixture
def _several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small inputs are divided as large ones are."""
    for name, value in (("WORKSPACE_BYTES", 1), ("MIN_ROWS", 128), ("_SINGLE_CHUNK_EXCESS", 0)):
        monkeypatch.setattr(chunks, name, value)
    monkeypatch.setattr(memory, "_spare", {})


@pytest.mark.usefixtures("_several_chunks")
def test_workspaces_agree_but_for_roundings() -> None:
    inputs = _inputs()
    (small, *small_grads), (fast, *fast_grads), (auto, *auto_grads) = (
        _step("triton", inputs, LossOptions(workspace=workspace)) for workspace in ("small", "fast", "auto")
    )
    torch.testing.assert_close(fast.loss, small.loss, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(fast_grads, small_grads, strict=True):
        assert float((ours.double() - theirs.double()).norm() / theirs.double().norm()) < 3e-3
    # there is memory for so little: "auto" is "fast", bit for bit
    assert torch.equal(auto.loss, fast.loss) and all(map(torch.equal, auto_grads, fast_grads))
    device = inputs[0].device
    assert 0 < memory.spare_bytes(device) <= torch.cuda.get_device_properties(device).total_memory


@pytest.mark.usefixtures("_several_chunks")
def test_auto_workspace_is_chosen_during_a_capture() -> None:
    hidden, weight, labels, het = _inputs()
    options = LossOptions(max_rows=300, backend="triton")

    def step() -> torch.Tensor:
        hidden.grad = weight.grad = None
        out = ntp_loss(hidden, weight, labels, het=het, options=options)
        out.loss.backward()
        return out.loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = step().clone()
        wanted = weight.grad.clone()
    torch.cuda.current_stream().wait_stream(stream)
    memory._spare.clear()  # as if nothing had been asked before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(loss, expected) and torch.equal(weight.grad, wanted)
    assert list(memory._spare.values()) == [torch.cuda.get_device_properties(0).total_memory // 2]


@pytest.mark.parametrize("retain", [False, True])
def test_a_factor_is_not_rounded_to_bf16(retain: bool) -> None:
    """1/3 in bf16 is 0.2 % too large, and so would be all gradients."""
    inputs = _inputs()
    _, *whole = _step("triton", inputs, LossOptions())
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:2]]
    out = ntp_loss(*leaves, inputs[2], het=inputs[3], backend="triton")
    if retain:
        once = torch.autograd.grad(out.loss / 3, leaves, retain_graph=True)
        kept = [gradient.clone() for gradient in once]
    (out.loss / 3).backward()
    for leaf, gradient in zip(leaves, whole, strict=True):
        result, expected = 3 * leaf.grad.double(), gradient.double()
        assert abs((result * expected).sum() / expected.square().sum() - 1) < 5e-4
    if retain:
        assert all(torch.equal(a, b) for a, b in zip(once, kept, strict=True)), "a later backward changed a gradient"


@pytest.mark.parametrize("width", [250, 51])
def test_unaligned_rows(width: int) -> None:
    hidden, weight, labels, het = _inputs()
    inputs = (hidden[..., :width], weight[..., :width], labels, het)
    expected, *truth = _step("reference", inputs, LossOptions(), torch.float64)
    result, *got = _step("triton", inputs, LossOptions())
    torch.testing.assert_close(result.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    for ours, exact in zip(got, truth, strict=True):
        assert float((ours.double() - exact).norm() / exact.norm()) < 3.5e-3


def test_bf16_loss_is_exact_where_rounded_logits_are_not() -> None:
    """Large logits: the loss error stays at fp32's, whatever the rounding of bf16 logits would do."""
    inputs = _inputs()
    inputs = (inputs[0] * 6, *inputs[1:])
    expected, *_ = _step("reference", inputs, LossOptions(), torch.float64)
    result, *_ = _step("triton", inputs, LossOptions())
    assert abs(result.loss.double() - expected.loss) < 1e-5 * expected.loss
