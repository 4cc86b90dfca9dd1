"""A fused model in the hands of accelerate: mixed precision, unwrapping, and devices that hooks bring together."""

from __future__ import annotations

from typing import Any

import pytest
from accelerate import Accelerator, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.state import AcceleratorState, GradientState
from tiny_llama import assert_same, batch, build, gradients

from ntpseg.losses.huggingface import fuse_causal_lm, is_fused, unfuse_causal_lm


@pytest.fixture(autouse=True)
def _forget() -> Any:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_prepared_and_unwrapped(precision: str) -> None:
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    truth = gradients(build(), batch())
    model = fuse_causal_lm(build(), negatives=0)
    prepared = accelerator.prepare(model)
    out = prepared(**batch())
    assert out.logits is None
    assert float(out.loss.detach()) == pytest.approx(float(truth["loss"]), rel=1e-5 if precision == "no" else 1e-2)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert is_fused(unwrapped)
    assert_same(gradients(unwrapped, batch()), truth)
    positional = unwrapped(batch()["input_ids"], labels=batch()["labels"])
    assert float(positional.loss.detach()) == pytest.approx(float(truth["loss"]), rel=1e-5)
    if precision == "bf16":
        with pytest.raises(ValueError, match=r"model\.forward must be that of .* fuse before Accelerator\.prepare"):
            fuse_causal_lm(Accelerator(mixed_precision="bf16", cpu=True).prepare(build()))


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_that_move_tensors(when: str) -> None:
    """What ``device_map`` installs: accelerate puts its forward in the place of the module's."""

    def hooked(model: Any) -> Any:
        add_hook_to_module(model.lm_head, AlignDevicesHook(execution_device="cpu", io_same_device=True))
        add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True))
        return model

    truth = gradients(build(), batch())
    if when == "before":
        model = hooked(fuse_causal_lm(build(), negatives=0))
    else:
        model = fuse_causal_lm(hooked(build()), negatives=0)
    assert hasattr(model.lm_head, "_hf_hook")
    assert model(**batch()).logits is None
    assert_same(gradients(model, batch()), truth)
    unfuse_causal_lm(model)
    assert model(**batch()).logits is not None
    assert_same(gradients(model, batch()), truth)


def test_a_dispatched_model() -> None:
    truth = gradients(build(), batch())
    model = dispatch_model(build(), {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    assert_same(gradients(fuse_causal_lm(model, negatives=0), batch()), truth)
