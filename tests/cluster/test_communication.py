"""What a step sends: formulas against their own meaning, and against two real ranks whose collectives are counted."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter

import pytest
import torch

from benchmarks.communication import exact, line, run
from ntpseg.cluster.communication import (
    STRATEGIES,
    ModelShape,
    TrafficOptions,
    by_kind,
    het_exchange,
    step_traffic,
    total_bytes,
    training_collectives,
    vocab_parallel_loss,
    wire_bytes,
    zero3,
)
from ntpseg.cluster.communication.parameters import Module, Parameter
from ntpseg.cluster.communication.strategies import ZeroSettings
from ntpseg.cluster.workload import Workload
from ntpseg.training.config import CONFIGS, load_config


@pytest.fixture(scope="module")
def emu3() -> ModelShape:
    return Workload.of(load_config("emu3-8b")).shape


@pytest.fixture(scope="module")
def tiny() -> ModelShape:
    return Workload.of(load_config("tiny")).shape


def _gathered(shape: ModelShape, **settings: object) -> int:
    options = TrafficOptions("zero3", 8, dtype="bfloat16", **settings)  # type: ignore[arg-type]
    weights = [each for each in step_traffic(shape, options) if each.reason.startswith("weights for")]
    return total_bytes(weights)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_two_ranks_send_what_is_predicted() -> None:
    """Real steps, call by call and byte by byte; with limits under which ZeRO-3 gathers as a large model does."""
    cases = ["smallest,ddp", "smallest,fsdp2", "het", "vocabulary", "smallest,zero2"]
    cases += ["smallest,zero3,max_live=20000,max_reuse=20000,checkpointing=1"]
    rows = run(2, cases, timeout=280)
    assert [row["case"] for row in rows] == cases
    assert [line(row) for row in rows if not exact(row)] == []
    # What was compared is not nothing: weights or gradients of 422,912 bytes each time, but in the two of our own.
    for row in rows:
        size = sum(found["measured"]["bytes"] for found in row["kinds"].values())
        assert size > (5_000 if row["case"] in ("het", "vocabulary") else 422_912), row


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_wire_bytes_are_those_of_a_ring(ranks: int) -> None:
    """Chunks passed on by hand: n - 1 rounds scatter the sums, n - 1 more gather them."""
    chunk = 12
    held = [[{rank} for _ in range(ranks)] for rank in range(ranks)]  # whose numbers each chunk of a rank sums up
    sent = 0
    for turn in range(ranks - 1):
        for rank, number in [(rank, (rank - turn) % ranks) for rank in range(ranks)]:
            held[(rank + 1) % ranks][number] = held[(rank + 1) % ranks][number] | held[rank][number]
            sent += chunk
    assert all(any(len(part) == ranks for part in rank) for rank in held)
    assert wire_bytes("reduce_scatter", chunk * ranks, ranks) == sent / ranks
    assert wire_bytes("all_gather", chunk * ranks, ranks) == sent / ranks
    assert wire_bytes("all_reduce", chunk * ranks, ranks) == 2 * sent / ranks
    assert wire_bytes("all_reduce", 100, ranks, "tree") == 200
    assert wire_bytes("all_reduce", 100, 1) == 0


def test_every_strategy_sends_every_gradient(tiny: ModelShape) -> None:
    for strategy in STRATEGIES:
        for ranks in (2, 8, 1024):
            options = TrafficOptions(strategy, ranks, dtype="float32")
            traffic = step_traffic(tiny, options)
            gradients = total_bytes(each for each in traffic if each.reason == "gradients")
            assert gradients >= 4 * tiny.numel
            if strategy in ("ddp", "zero1", "zero2"):
                assert gradients == 4 * tiny.numel  # nothing is padded
        assert step_traffic(tiny, TrafficOptions(strategy, 1)) == []


def test_accumulation(tiny: ModelShape) -> None:
    """DDP and ZeRO-1 reduce once a step, the others in each micro-batch."""
    for strategy in STRATEGIES:
        one, four = (
            total_bytes(c for c in step_traffic(tiny, TrafficOptions(strategy, 4, n)) if c.reason == "gradients")
            for n in (1, 4)
        )
        assert four == one * (1 if strategy in ("ddp", "zero1") else 4)


def test_dtype(tiny: ModelShape) -> None:
    sizes = {
        (strategy, dtype): total_bytes(
            c for c in step_traffic(tiny, TrafficOptions(strategy, 4, dtype=dtype)) if c.reason == "gradients"
        )
        for strategy in STRATEGIES
        for dtype in ("float32", "bfloat16")
    }
    for strategy in STRATEGIES:  # autocast leaves DDP's gradients in float32
        halved = 1 if strategy == "ddp" else 2
        assert sizes[strategy, "float32"] == halved * sizes[strategy, "bfloat16"]


def test_zero3_gathers_a_large_model_again(emu3: ModelShape, tiny: ModelShape) -> None:
    """Within ``stage3_max_reuse_distance`` weights stay for backward; emu3-8b has eight times as many."""
    large = _gathered(emu3) / (2 * emu3.numel)
    assert 1.85 < large < 2.0
    assert 0.99 < _gathered(tiny) / (2 * tiny.numel) <= 1.0
    assert _gathered(emu3, activation_checkpointing=True) == pytest.approx(_gathered(emu3), rel=0.05)
    none = ZeroSettings(stage3_max_live_parameters=0, stage3_max_reuse_distance=0)
    assert _gathered(emu3, zero=none) < _gathered(emu3, zero=none, activation_checkpointing=True)


def test_the_shipped_deepspeed_files_mean_the_defaults() -> None:
    for name in ("zero1", "zero2", "zero3"):
        assert ZeroSettings.of(json.loads((CONFIGS / f"{name}.json").read_text())) == ZeroSettings()
    given = ZeroSettings.of({"zero_optimization": {"reduce_bucket_size": 5e8, "stage3_max_live_parameters": 7}})
    assert given.resolved(64) == (500_000_000, int(0.9 * 64**2), 640) and given.stage3_max_live_parameters == 7


def test_buckets_by_hand() -> None:
    """Four parameters of 6, 10, 3 and 1 elements on two ranks, buckets of 8 elements: parts end after element 10."""
    parameters = [Parameter(f"p{n}", (size,), n, True) for n, size in enumerate((6, 10, 3, 1))]
    shape = ModelShape((Module("m", tuple(parameters), None),), 1, 1, 4, ())
    settings = ZeroSettings(8, 8, 0)

    def payloads(strategy: str) -> Counter[int]:
        traffic = step_traffic(shape, TrafficOptions(strategy, 2, dtype="float32", zero=settings))  # type: ignore[arg-type]
        return Counter({each.payload // 4: each.calls for each in traffic if each.reason == "gradients"})

    # 6; the 10, of which 4 are the first rank's, in one call as neither 4 nor 8 exceeds... 4 + 6 does, so one of 10
    assert payloads("zero1") == Counter({6: 1, 10: 1, 4: 1})
    # from the end: 1 + 3, then 10, then 6
    assert payloads("zero2") == Counter({4: 1, 10: 1, 6: 1})
    # padded to the ranks one by one: 2 + 4
    assert payloads("zero3") == Counter({6: 2, 10: 1})
    assert payloads("ddp") == Counter({20: 1})


def test_fsdp2_pads_the_first_dimension() -> None:
    parameter = Parameter("w", (3, 5), 0, True)
    shape = ModelShape((Module("m", (parameter,), None),), 1, 1, 4, ())
    for ranks, rows in ((2, 4), (3, 3), (8, 8)):
        found = by_kind(step_traffic(shape, TrafficOptions("fsdp2", ranks, dtype="float32")))
        assert found["all_gather"] == {"calls": 1, "bytes": rows * 5 * 4}


def test_trace_of_a_checkpointed_layer(tiny: ModelShape) -> None:
    """As DeepSpeed records it: the last module and those around it, forward again, then backward of the rest."""
    names = [run.module.name.removeprefix("backbone.layers.3") for run in zero3._trace(tiny.modules, True)]
    start = names.index("backbone.norm", names.index("heads")) + 1
    layer = "||.mlp|.mlp.down_proj|.input_layernorm|.self_attn|.self_attn.q_proj|.self_attn.q_norm|.self_attn.k_proj|"
    layer += ".self_attn.k_norm|.self_attn.v_proj|.self_attn.o_proj|.post_attention_layernorm|.mlp|.mlp.gate_proj|"
    layer += (
        ".mlp.act_fn|.mlp.up_proj|.mlp.down_proj|.mlp.up_proj|.mlp.act_fn|.mlp.gate_proj|.post_attention_layernorm|"
    )
    layer += ".self_attn|.self_attn.o_proj|.self_attn.v_proj|.self_attn.k_norm|.self_attn.k_proj|.self_attn.q_norm|"
    layer += ".self_attn.q_proj|.input_layernorm|backbone.layers.2|"
    assert "|".join(["", *names[start:]]).startswith(layer)


def test_tied_embeddings_are_sent_once() -> None:
    from ntpseg.models import NTPSegConfig, NTPSegModel

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = NTPSegConfig(text_config={"model_type": "qwen3", **sizes}, tie_word_embeddings=True)
    with torch.device("meta"):
        model = NTPSegModel(config)
    shape = ModelShape.of(model)
    assert shape.numel == sum(p.numel() for p in model.parameters())
    assert shape.gradient_order[-1].name == "backbone.embed_tokens.weight"
    # FSDP2 gathers the tied pair and the root once, the layer twice
    weights = [c for c in step_traffic(shape, TrafficOptions("fsdp2", 2)) if c.kind == "all_gather"]
    assert sum(each.calls for each in weights) == 4


def test_het_rounds_and_vocabulary_blocks() -> None:
    assert het_exchange((10, 5), 4, 1) == [] == vocab_parallel_loss(10, 160, 2, 5, 3, 1)
    whole = total_bytes(het_exchange((1000, 500), 4, 2))
    rounds = het_exchange((1000, 500), 4, 2, round_bytes=2 * 60 * 300)  # 300 rows a round
    assert whole == 32 + 4 * 48 + 2 * 1500 * 60
    assert total_bytes(rounds) == whole + (6 - 2) * 48
    assert sum(each.calls for each in rounds if each.reason == "hard-token rows") == 4 + 2
    one, four = (vocab_parallel_loss(100, 1600, blocks, 5, 3, 4) for blocks in (1, 4))
    assert total_bytes(one) == total_bytes(four) == 32 + 100 * (3 * 4 + 8 + 8 * 4) + 1600 * 4
    assert sum(each.calls for each in four) - 2 == 4 * (sum(each.calls for each in one) - 2)


def test_the_trainer_sends_little() -> None:
    assert total_bytes(training_collectives(4, 4)) == 8 * 10 + 16 + 8 * 7 + 16
    assert total_bytes(training_collectives(4, 4, logged=False)) == 8 * 10 + 16


def test_refusals() -> None:
    with pytest.raises(ValueError, match="strategy must be"):
        TrafficOptions("zero4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ranks must be"):
        TrafficOptions("ddp", 0)
    with pytest.raises(ValueError, match="dtype must be"):
        TrafficOptions("ddp", 1, dtype="int8")
    with pytest.raises(ValueError, match="kind must be"):
        wire_bytes("gather", 1, 2)  # type: ignore[arg-type]
