"""16-bit operands on a CPU, with and without the units for them: the switch is forced, so both run on any machine."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from loss_cases import draw, error

from ntpseg import ntp_loss
from ntpseg.losses import products

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["native", "plain"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setenv("NTPSEG_DISABLE_NATIVE", "1")
    return request.param


def force(monkeypatch: pytest.MonkeyPatch, units: bool) -> None:
    monkeypatch.setattr(products, "has_bfloat16_units", lambda: units)


def test_chooses_by_the_units(monkeypatch: pytest.MonkeyPatch) -> None:
    for units, expected in ((True, torch.bfloat16), (False, torch.float32)):
        force(monkeypatch, units)
        assert products.product_dtype(torch.bfloat16, CPU) == expected
        assert products.product_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
        assert products.product_dtype(torch.float16, CPU) == torch.float32
        assert products.product_dtype(torch.float64, CPU) == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1, 33, 64])
@pytest.mark.parametrize(
    "options",
    [{}, {"per_head": True, "chunk_bytes": 9000}, {"temperature": 0.5, "z_loss": 0.01}, {"vocab_range": (3, 600)}],
    ids=str,
)
def test_without_units_the_loss_is_exact_for_its_operands(
    dtype: torch.dtype, width: int, options: dict, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products in float32 of operands that float32 holds: only the gradients are rounded, once, at the end."""
    force(monkeypatch, False)
    monkeypatch.setattr(products, "_WIDENED_BYTES", 1)  # several parts of the weight, the last one short
    case = draw(2, 23, 3, width, 701, dtype=dtype, scale=width**-0.5, slots=6, negatives=3, **options)
    truth, *truth_grads = case.run("reference", torch.float64)
    result, *grads = case.run("torch")
    assert torch.equal(result.prediction, truth.prediction)
    assert error(result.nll, truth.nll) < 1e-6
    assert float(result.loss.detach()) == pytest.approx(float(truth.loss.detach()), rel=1e-5)
    for one, other in zip(grads, truth_grads):
        assert one.dtype == dtype
        assert error(one, other) < (2e-3 if dtype == torch.bfloat16 else 4e-4)


@pytest.mark.parametrize("width", [32, 33])
def test_with_units_the_error_is_within_twice_that_of_pytorch(
    width: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, True)
    case = draw(2, 23, 3, width, 701, dtype=torch.bfloat16, scale=width**-0.5, slots=6, negatives=0)
    truth, *truth_grads = case.run("reference", torch.float64)
    eager, *eager_grads = case.run("reference")
    result, *grads = case.run("torch")
    floor = torch.finfo(torch.float32).eps
    assert error(result.nll, truth.nll) <= 2 * error(eager.nll, truth.nll) + floor
    for one, eager_one, other in zip(grads, eager_grads, truth_grads):
        assert error(one, other) <= 2 * error(eager_one, other) + 4 * floor


@pytest.mark.parametrize("units", [True, False])
def test_filtered_gradients_are_near_the_whole_ones(units: bool, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, units)
    shape = {"width": 32, "classes": 701, "dtype": torch.bfloat16, "scale": 0.5, "negatives": 0}
    _, *whole = draw(**shape).run("torch")
    _, *filtered = draw(**shape, gradient_filter=1e-5).run("torch")
    for one, other in zip(filtered, whole):
        assert error(one, other) < 1e-2


@pytest.mark.skipif(not RESET.exists(), reason="needs Linux to tell the peak of the resident set")
def test_memory_without_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block, the float32 sum of the weight's gradient and a part of the weight: no float32 copy of the weight."""
    force(monkeypatch, False)
    rows, width, classes = 800, 512, 32768
    hidden = torch.randn(1, rows + 1, 1, width).bfloat16().requires_grad_()
    weight = (torch.randn(classes, width) / width**0.5).bfloat16().requires_grad_()
    labels = torch.randint(0, classes, (1, rows + 1))
    gc.collect()
    before = megabytes("VmRSS")
    RESET.write_text("5")
    ntp_loss(hidden, weight, labels, backend="torch").loss.backward()
    gradients = (hidden.numel() + weight.numel()) * 2 / 1e6
    assert megabytes("VmHWM") - before - gradients < 200


def megabytes(field: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6
