"""Random arguments of the loss, right and wrong: right ones agree with float64, wrong ones end in one line.

The reference is the package's own restatement of the definition in plain autograd, in float64 and with everything that
could be clamped, padded or cast away done by hand beforehand.
"""

from __future__ import annotations

import importlib.util
import resource
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuzz_settings import fuzz_settings
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ntpseg import HardTokens, NTPOutput, NumItems, ntp_loss
from ntpseg.losses import count_items

BACKENDS = ["reference", "torch"] + (["triton"] if importlib.util.find_spec("triton") else [])
MEMORY_KIB = 400_000

NAN, INF = float("nan"), float("inf")
ODD = [NAN, INF, -INF, -1, -0.5, 10**400, True, False, None, "1", "", [1], (), {}, b"x", 1j, object()]
ODD_NUMBERS = st.sampled_from(ODD)
ODD_INTEGERS = st.one_of(ODD_NUMBERS, st.sampled_from([1.0, 2.5, -(2**63) - 1, 2**63, -1]))


def wrong_tensor(right: Tensor) -> st.SearchStrategy[Any]:
    """What cannot stand for this tensor: no tensor, or another shape, dtype, layout or device."""
    other = torch.float32 if not right.is_floating_point() else torch.int64
    return st.sampled_from(
        [
            None,
            1.0,
            "labels",
            right.tolist(),
            right.detach().to(other),
            right.detach().to(torch.complex64),
            right.detach() > 0,
            right[..., None, None, None],
            right.new_zeros(0),
            right.new_zeros(()),
            right.detach().to_sparse(),
            right.to("meta"),
        ]
    )


@st.composite
def calls(draw: Callable[..., Any], least_batch: int = 0) -> dict[str, Any]:
    """Arguments that are right, in every form that they may have."""
    batch, time, heads, width = (draw(st.integers(*span)) for span in ((least_batch, 3), (1, 6), (1, 3), (1, 5)))
    classes = draw(st.integers(1, 9))
    seed = draw(st.integers(0, 2**32 - 1))
    make = torch.Generator().manual_seed(seed)
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    low = draw(st.integers(0, classes - 1))
    span = draw(st.sampled_from([None, (low, classes), [low, classes]]))
    ignore = draw(st.sampled_from([-100, -1, 0, 2**40]))
    first = low if span else 0
    labels = torch.randint(first, classes, (batch, time), generator=make)
    labels[torch.rand(batch, time, generator=make) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = ignore
    hidden = torch.randn(batch, time, heads, width, generator=make, dtype=torch.float64).to(dtype)
    if heads == 1 and draw(st.booleans()):
        hidden = hidden[:, :, 0]
    if draw(st.booleans()):  # not contiguous
        hidden = torch.stack([hidden, hidden], -1)[..., 0]
    per_head = draw(st.booleans())
    weight = torch.randn(*((heads,) if per_head else ()), classes, width, generator=make, dtype=torch.float64)
    call: dict[str, Any] = {
        "hidden": hidden.requires_grad_(draw(st.booleans())),
        "weight": weight.to(draw(st.sampled_from([dtype, torch.float32]))).requires_grad_(draw(st.booleans())),
        "labels": labels if draw(st.booleans()) or ignore == 2**40 else labels.int(),
        "vocab_range": span,
        "ignore_index": ignore,
        "shift": draw(st.booleans()),
        "negatives": draw(st.sampled_from([0, 1, 3, 10**9, 2**63 - 1])),
        "tcl_weight": draw(st.sampled_from([0, 0.5, 1.0])),
        "het_weight": draw(st.sampled_from([0.0, 2])),
        "temperature": draw(st.sampled_from([1, 0.5, 3.0])),
    }
    if draw(st.booleans()):
        weights = torch.rand(batch, time, generator=make)
        weights[labels == ignore] = draw(st.sampled_from([0.0, NAN, -1.0]))
        call["token_weights"] = weights.to(draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16])))
    if draw(st.booleans()):
        slots = draw(st.integers(0, 3))
        extremes = torch.tensor([-(2**63), -1, 0, 1, 2, 3, 7, 2**31, 2**63 - 1])
        pick = [extremes[torch.randint(0, len(extremes), (batch, slots), generator=make)] for _ in range(2)]
        call["het"] = HardTokens(*pick)
    if draw(st.booleans()):
        call["head_weights"] = draw(st.sampled_from([[1.0] * heads, torch.arange(1, heads + 1), (0.5,) * heads]))
    if draw(st.booleans()):
        call["bias"] = torch.randn(weight.shape[:-1], generator=make, dtype=dtype)
    count = draw(st.sampled_from([0, 3, 2.5, torch.tensor(4), torch.tensor(2.0)]))
    call["num_items"] = draw(
        st.sampled_from([None, count, NumItems([2.0] * heads, count), NumItems(torch.ones(heads))])
    )
    return call


@st.composite
def wrong_calls(draw: Callable[..., Any]) -> tuple[dict[str, Any], str]:
    """The same with one argument wrong, and its name."""
    call = draw(calls(least_batch=1))
    labels: Tensor = call["labels"]
    names = ["hidden", "weight", "labels", "negatives", "tcl_weight", "het_weight", "temperature", "head_weights"]
    names += ["ignore_index", "shift", "vocab_range", "num_items", "het", "token_weights", "bias", "group", "backend"]
    name = draw(st.sampled_from(names))
    step = int(call["shift"])
    read = labels.shape[0] > 0 and labels.shape[1] > step
    if name == "labels" and read and labels.dtype == torch.int64 and draw(st.booleans()):
        spoilt = labels.clone()
        wrong = [v for v in (-7, 9, 10**6, -(2**63), 2**63 - 1) if v != call["ignore_index"]]
        spoilt[-1, -1] = draw(st.sampled_from(wrong))
        return {**call, name: spoilt}, name
    if name == "token_weights" and read and draw(st.booleans()):
        spoilt = torch.ones(labels.shape)
        spoilt[-1, -1] = draw(st.sampled_from([NAN, INF, -INF, -1e-30]))
        legal = torch.full_like(labels, call["weight"].shape[-2] - 1)
        return {**call, "labels": legal, "ignore_index": -100, name: spoilt}, name
    if name in ("hidden", "weight", "labels"):
        return {**call, name: draw(wrong_tensor(call[name]))}, name
    if name == "token_weights":
        return {**call, name: draw(wrong_tensor(torch.ones(labels.shape)).filter(lambda x: x is not None))}, name
    if name == "bias":
        right = torch.zeros(call["weight"].shape[:-1])
        return {**call, name: draw(wrong_tensor(right).filter(lambda x: x is not None))}, name
    if name == "het":
        slots = torch.zeros(labels.shape[0], 2, dtype=torch.int64)
        bad = draw(wrong_tensor(slots))
        return {
            **call,
            name: draw(st.sampled_from([HardTokens(bad, slots), HardTokens(slots, bad), 3, (slots, slots)])),
        }, name
    if name == "num_items":
        bad = draw(ODD_NUMBERS.filter(lambda v: v is not None and v is not False and v != ()))
        bad = draw(st.sampled_from([bad, NumItems(bad), NumItems([bad]), torch.tensor(NAN), torch.tensor([-1.0, 2.0])]))
        return {**call, name: bad}, name
    if name == "head_weights":
        bad = [[], [1.0] * 7, [NAN], [-1.0], [0.0], "w", 3, [None], [[1.0]], torch.tensor([[1.0]]), [True]]
        return {**call, name: draw(st.sampled_from(bad))}, name
    if name == "vocab_range":
        bad = [(None, 3), (3, 1), (0, 10**9), (0, 10**400), (0.0, 1.0), (0,), 5, "01", (0, NAN), ([], {}), (0, True)]
        return {**call, name: draw(st.sampled_from(bad))}, name
    if name == "shift":
        return {**call, name: draw(st.sampled_from([None, 2, "no", NAN, 0]))}, name
    if name in ("negatives", "ignore_index"):
        odd = ODD_INTEGERS if name == "negatives" else ODD_INTEGERS.filter(lambda v: v != -1)
        return {**call, name: draw(odd.filter(lambda v: not (type(v) is int and 0 <= v < 2**53)))}, name
    if name == "temperature":
        return {**call, name: draw(st.one_of(ODD_NUMBERS, st.sampled_from([0, 0.0, -0.0])))}, name
    if name == "backend":
        return {**call, name: draw(st.sampled_from(["cuda", "", None, 3, NAN, ["torch"], "Torch"]))}, name
    return {**call, name: draw(ODD_NUMBERS.filter(lambda v: v is not None or name != "group"))}, name


def run(call: dict[str, Any], backend: str) -> tuple[NTPOutput, list[Tensor | None]]:
    """The loss and its gradients."""
    call = {**call}
    leaves = [call.pop(name) for name in ("hidden", "weight")]
    out = ntp_loss(*leaves, call.pop("labels"), **{"backend": backend, **call})
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return out, list(torch.autograd.grad(out.loss, wanted)) if wanted else []


def in_float64(call: dict[str, Any]) -> dict[str, Any]:
    """The same call for the reference."""
    exact = {**call, "labels": call["labels"].long(), "negatives": min(call["negatives"], 10)}
    for name in ("hidden", "weight"):
        # the weight is cast to the dtype of hidden, which rounds it
        value = call[name].detach().to(call["hidden"].dtype).double()
        exact[name] = value.requires_grad_(call[name].requires_grad)
    for name in ("token_weights", "bias"):
        if call.get(name) is not None:
            exact[name] = call[name].double()
    return exact


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@fuzz_settings(50)
@given(call=calls(), backend=st.sampled_from(["torch", *BACKENDS]))
def test_right_arguments_agree_with_float64(call: dict[str, Any], backend: str) -> None:
    before = peak()
    truth, exact_gradients = run(in_float64(call), "reference")
    tolerance = 1e-9 if call["hidden"].dtype == torch.float64 else 2e-4
    out, gradients = run(call, backend)
    for name in ("loss", "ntp", "nktp", "tcl", "het", "nll"):
        found, expected = getattr(out, name).detach().double(), getattr(truth, name).detach()
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=name)
    for found, expected in zip(gradients, exact_gradients):
        error = (found.double() - expected).norm()
        allowed = tolerance if found.dtype == torch.float64 else 2e-4  # that of a weight in float32 is rounded
        assert error <= allowed * (1 + expected.norm()), float(error)
    assert peak() - before < MEMORY_KIB


@fuzz_settings(200)
@given(case=wrong_calls(), backend=st.sampled_from(BACKENDS))
def test_a_wrong_argument_ends_in_one_line_that_names_it(case: tuple[dict[str, Any], str], backend: str) -> None:
    call, name = case
    before = peak()
    with pytest.raises(ValueError) as refused:
        run(call, backend)
    text = str(refused.value)
    # a wrong tensor may be noticed by what no longer fits it
    related = {"hidden": ("weight", "labels", "token_weights", "bias", "head_weights", "num_items", "het")}
    related |= {
        "weight": ("labels", "bias", "vocab_range", "hidden"),
        "ignore_index": ("labels",),
        "vocab_range": ("labels",),
    }
    assert text.startswith((name, *related.get(name, ()))), text
    assert "must" in text and "got" in text and "\n" not in text and len(text) < 300
    assert peak() - before < MEMORY_KIB


@fuzz_settings(150)
@given(case=st.one_of(wrong_calls(), st.tuples(calls(), st.none())), k=st.one_of(st.integers(1, 9), ODD_INTEGERS))
def test_counts(case: tuple[dict[str, Any], str | None], k: Any) -> None:
    call = {name: case[0].get(name) for name in ("het", "vocab_range", "token_weights")}
    labels = case[0]["labels"]
    call |= {name: case[0][name] for name in ("ignore_index", "shift")}
    try:
        counts = count_items(labels, k, **call)
    except ValueError as error:
        text = str(error)
        assert text.startswith(("k ", *(name for name in (*call, "labels"))))
        assert "\n" not in text and len(text) < 300
        right = type(k) is int and 1 <= k < 2**63
        assert not right or case[1] is not None, text
        return
    assert type(k) is int and k >= 1
    if labels.is_meta:
        assert counts.rows.is_meta
        return
    expected = []
    for j in range(k):
        total = 0.0
        for b in range(labels.shape[0]):
            for t in range(int(call["shift"]) + j, labels.shape[1]):
                if int(labels[b, t]) != call["ignore_index"]:
                    total += 1.0 if call["token_weights"] is None else float(call["token_weights"][b, t])
        expected.append(total)
    assert counts.rows.tolist() == pytest.approx(expected, rel=1e-12)
