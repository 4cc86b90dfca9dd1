"""Which attention is used: what a name needs, what auto remembers, and that all ranks agree."""

from __future__ import annotations

import dataclasses
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from ntpseg.models import attention, attention_choice
from ntpseg.models.attention import AttentionUse, implementation, obstacle
from ntpseg.models.attention_choice import choose_attention

CPU = AttentionUse(torch.device("cpu"), torch.float32, batch=2, heads=2, length=24, width=16)
GPU = dataclasses.replace(CPU, device=torch.device("cuda"), dtype=torch.bfloat16, width=64)


@pytest.fixture
def gpu(monkeypatch):
    """Function: pretend that there is a GPU of this compute capability, with these packages installed."""

    def pretend(
        capability: tuple[int, int] = (9, 0), installed: tuple[str, ...] = (), broken: str | None = None
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object() if name in installed else None)

        def load(name: str):
            if broken is not None:
                raise ImportError(broken)
            return ModuleType(name)

        monkeypatch.setattr(attention.importlib, "import_module", load)

    return pretend


@pytest.mark.parametrize("name", ["flash", "xformers"])
def test_a_cpu_has_neither(name) -> None:
    with pytest.raises(ValueError, match=f"got '{name}': it needs an NVIDIA GPU, and the model runs on cpu"):
        implementation(name, CPU)


@pytest.mark.parametrize(
    ("name", "change", "capability", "reason"),
    [
        ("flash", {}, (9, 0), r"flash-attn is not installed; pip install flash-attn"),
        ("flash", {}, (7, 5), r"compute capability 8\.0 or more, and this one has 7\.5"),
        ("flash", {"dtype": torch.float32}, (8, 0), "bfloat16 or float16, and this is float32; set training.bf16=true"),
        ("flash", {"width": 320}, (8, 0), "at most 256 features, a multiple of 8, and these have 320"),
        ("flash", {"width": 20}, (8, 0), "multiple of 8, and these have 20"),
        ("flash", {"prefix": True}, (8, 0), r"takes no mask, which model\.prefix_lm=true needs"),
        ("flash_attention_3", {}, (8, 0), r"needs a Hopper GPU .*, and this one has 8\.0; use flash"),
        ("flash_attention_3", {}, (9, 0), r"FlashAttention 3 is not installed; build it from the folder hopper"),
        ("flash_attention_3", {"dropout": 0.1}, (9, 0), "has no dropout; set model.overrides.attention_dropout=0"),
        ("xformers", {}, (8, 0), "xformers is not installed; pip install xformers"),
        ("xformers", {"width": 12}, (8, 0), "multiple of 8, and these have 12"),
        ("xformers", {"dtype": torch.float64}, (8, 0), "float16 or float32, and this is float64"),
        ("flex", {"dropout": 0.1}, (8, 0), "flex attention has no dropout"),
        ("flex", {"device": torch.device("cpu")}, (8, 0), "flex attention has no backward on a CPU"),
    ],
)
def test_why_not_and_what_would_help(gpu, name, change, capability, reason) -> None:
    gpu(capability)
    with pytest.raises(
        ValueError, match=rf"^attention must be one that can be used here, .*, got '{name}': .*{reason}"
    ) as e:
        implementation(name, dataclasses.replace(GPU, **change))
    assert "\n" not in str(e.value)


def test_what_is_there_is_used(gpu) -> None:
    gpu((8, 0), ("flash_attn", "flash_attn_interface", "xformers"))
    assert implementation("flash", GPU) == "flash_attention_2"
    assert implementation("xformers", GPU) == "xformers"
    assert implementation("flex", GPU) == "flex_attention"
    gpu((9, 0), ("flash_attn", "flash_attn_interface"))
    assert implementation("flash", GPU) == "flash_attention_3"
    assert implementation("flash", dataclasses.replace(GPU, dropout=0.1)) == "flash_attention_2"
    gpu((9, 0), ("flash_attn",), broken="libcudart.so.11: cannot open\nmore")
    assert obstacle("flash", GPU) == (
        "flash-attn cannot be imported (libcudart.so.11: cannot open); pip install flash-attn --no-build-isolation"
    )
    for name in ("sdpa", "eager", "causal_blocks"):
        assert implementation(name, GPU) == implementation(name, CPU) == name
    assert implementation("owner/kernel", CPU) == "owner/kernel", "of the hub, which transformers judges"
    with pytest.raises(ValueError, match=r"attention must be one of auto, flash, .*, got 'nonsense'"):
        implementation("nonsense", CPU)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Measuring is allowed; the list of all uses that were measured, of which eager is the quickest."""
    monkeypatch.setenv("NTPSEG_CACHE", str(tmp_path))
    monkeypatch.setenv("NTPSEG_MEASURE_ATTENTION", "1")
    monkeypatch.setattr(attention_choice, "_known", {})
    uses: list[AttentionUse] = []

    def measure(use):
        uses.append(use)
        return {"sdpa": 2.0, "eager": 1.0}, {"flash": "no"}

    monkeypatch.setattr(attention_choice, "measure", measure)
    return uses


def test_auto_measures_once_for_a_class_of_shapes(measured, tmp_path, monkeypatch) -> None:
    first = choose_attention("auto", CPU)
    assert (first.attention, first.implementation, first.source) == ("eager", "eager", "measured")
    for change in ({}, {"length": 30}, {"batch": 1, "heads": 4}):
        assert choose_attention("auto", dataclasses.replace(CPU, **change)).source == "remembered"
    assert len(measured) == 1
    monkeypatch.setattr(attention_choice, "_known", {})  # another process
    again = choose_attention("auto", CPU)
    assert (again.attention, again.source, again.milliseconds) == ("eager", "remembered", {"sdpa": 2.0, "eager": 1.0})
    assert len(measured) == 1
    others = [
        {"length": 33}, {"batch": 3}, {"width": 32}, {"prefix": True}, {"training": False}, {"dtype": torch.bfloat16},
        {"packing": 64}, {"kv_heads": 1}, {"dropout": 0.1},
    ]  # fmt: skip
    for change in others:
        choose_attention("auto", dataclasses.replace(CPU, **change))
    assert len(measured) == 1 + len(others)
    content = json.loads((tmp_path / "attention.json").read_text())
    ((device, versions),) = content["choices"].items()
    assert "threads" in device and list(versions) == [f"torch {torch.__version__}"]
    assert len(versions[f"torch {torch.__version__}"]) == 1 + len(others)


def test_of_those_that_are_about_as_quick_the_one_that_keeps_less(measured, monkeypatch) -> None:
    times = {"eager": 1.0, "causal_blocks": 1.02, "sdpa": 1.029, "xformers": 1.2}
    monkeypatch.setattr(attention_choice, "measure", lambda use: (times, {}))
    assert choose_attention("auto", CPU).attention == "sdpa"


def test_one_rank_alone_may_choose(measured, monkeypatch) -> None:
    monkeypatch.setattr(attention_choice, "dist", None)  # a collective would fail
    assert choose_attention("auto", CPU, agree=False).attention == "eager"


def test_a_fixed_name_wins_and_what_cannot_run_is_measured_anew(measured, tmp_path, monkeypatch) -> None:
    choose_attention("auto", CPU)
    fixed = choose_attention("sdpa", CPU)
    assert (fixed.implementation, fixed.source) == ("sdpa", "configured")
    text = (tmp_path / "attention.json").read_text().replace('"attention": "eager"', '"attention": "flash"')
    (tmp_path / "attention.json").write_text(text)
    monkeypatch.setattr(attention_choice, "_known", {})
    assert choose_attention("auto", CPU).source == "measured"
    assert len(measured) == 2


@pytest.mark.parametrize(("variable", "value"), [("CI", "true"), ("PYTEST_CURRENT_TEST", "x"), (None, "0")])
def test_nothing_is_measured_where_tests_run(measured, monkeypatch, variable, value) -> None:
    choose_attention("auto", CPU)
    monkeypatch.setattr(attention_choice, "_known", {})
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("PYTEST_CURRENT_TEST", raising=False)
    monkeypatch.delenv("NTPSEG_MEASURE_ATTENTION")
    assert choose_attention("auto", dataclasses.replace(CPU, length=1000)).source == "measured"
    monkeypatch.setenv(variable or "NTPSEG_MEASURE_ATTENTION", value)
    choice = choose_attention("auto", dataclasses.replace(CPU, length=100))
    assert (choice.attention, choice.source) == ("causal_blocks", "default")
    assert len(measured) == 2


def test_ranks_get_what_the_first_one_chose(measured, monkeypatch) -> None:
    sent: list[object] = []
    place = {"rank": 0}
    dist = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2, get_rank=lambda: place["rank"]
    )

    def broadcast(found, src):
        assert src == 0
        if place["rank"] == 0:
            sent[:] = found
        else:
            assert found == [None], "this rank measured nothing"
            found[:] = sent

    dist.broadcast_object_list = broadcast
    monkeypatch.setattr(attention_choice, "dist", dist)
    choices = []
    for place["rank"] in (0, 1):
        monkeypatch.setattr(attention_choice, "_known", {})
        choices.append(choose_attention("auto", CPU))
    assert choices[0] == choices[1] and len(measured) == 1
    monkeypatch.setattr(attention_choice, "_known", {})
    monkeypatch.setattr(attention_choice, "quickest", lambda use: 1 / 0)
    for place["rank"] in (0, 1):
        with pytest.raises(ZeroDivisionError):
            choose_attention("auto", CPU)


@pytest.mark.parametrize("change", [{}, {"prefix": True}, {"packing": 60}, {"training": False, "kv_heads": 1}])
def test_measuring_runs_what_can_run(change) -> None:
    times, left_out = attention_choice.measure(dataclasses.replace(CPU, **change))
    assert set(times) == {"sdpa", "eager", "causal_blocks"} and all(0 < value < 1e4 for value in times.values())
    assert set(left_out) == {"flash", "xformers", "flex"}


def plain(query, key, value, seen) -> torch.Tensor:
    """``[B, T, H, D]``; `seen` is a bool mask or an additive one."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


@pytest.fixture
def xformers(monkeypatch) -> None:
    """A stand-in for the package, by the documentation of its masks."""
    bias = ModuleType("xformers.ops.fmha.attn_bias")

    class LowerTriangularMask:
        def mask(self, q: int, k: int) -> torch.Tensor:
            return torch.ones(q, k, dtype=torch.bool).tril()

    class LowerTriangularFromBottomRightMask:
        def mask(self, q: int, k: int) -> torch.Tensor:
            return torch.ones(q, k, dtype=torch.bool).tril(k - q)

    class BlockDiagonalCausalMask:
        @classmethod
        def from_seqlens(cls, lengths: list[int]):
            made = cls()
            made.lengths = lengths
            return made

        def mask(self, q: int, k: int) -> torch.Tensor:
            assert q == k == sum(self.lengths)
            return torch.block_diag(*(torch.ones(n, n).tril() for n in self.lengths)).bool()

    for kind in (LowerTriangularMask, LowerTriangularFromBottomRightMask, BlockDiagonalCausalMask):
        setattr(bias, kind.__name__, kind)

    def call(query, key, value, attn_bias=None, p=0.0, scale=None):
        assert query.shape[2] == key.shape[2] and scale == query.shape[-1] ** -0.5
        if isinstance(attn_bias, torch.Tensor):
            assert attn_bias.stride(-2) % 8 == 0 and attn_bias.shape[1] == query.shape[2]
            seen = attn_bias
        else:
            seen = None if attn_bias is None else attn_bias.mask(query.shape[1], key.shape[1])
        return plain(query, key, value, seen)

    ops = ModuleType("xformers.ops")
    ops.memory_efficient_attention = call
    for name, module in {"xformers.ops": ops, "xformers.ops.fmha.attn_bias": bias}.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("prefix", [False, True])
def test_xformers_gives_what_sdpa_gives(xformers, make_model, batch, prefix) -> None:
    """Plain, grouped, packed, padded on the left and cached."""
    from ntpseg.models.packing import PackedRows

    model = make_model(overrides={"num_key_value_heads": 1}, prefix_lm=prefix).eval()
    ids, grid = batch["input_ids"], batch["grid_ids"]
    lengths = [int((row != -100).nonzero().max()) + 1 for row in batch["labels"]]
    packing = PackedRows.plan(lengths, 70, ids.shape[1]).tensors()
    padded = torch.ones_like(ids)
    padded[1, :2] = 0
    states = []
    for name in ("sdpa", "xformers"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            found = [model(ids, grid_ids=grid, packing=packing).last_hidden_state]
            found.append(model(ids, grid_ids=grid).last_hidden_state)
            found.append(model(ids, grid_ids=grid, attention_mask=padded).last_hidden_state[1:2, 2:])
            first = model(ids[:, :13], grid_ids=grid[:, :13], use_cache=True)
            for start, stop in ((13, 14), (14, 20)):
                part = (slice(None), slice(start, stop))
                first = model(ids[part], grid_ids=grid[part], past_key_values=first.cache, use_cache=True)
                found.append(first.last_hidden_state)
        states.append(found)
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-5)
