"""Which workspace "auto" takes, on a card that is not there."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kernel_cases import draw_rows, run

from ntpseg.kernels import chunk_loop, chunks, memory
from ntpseg.kernels.chunk_loop import LoopOptions
from ntpseg.losses import LossOptions, triton_backend

CARD = torch.device("cuda", 0)
BF16 = torch.bfloat16
HOW = {"fused": True, "BLOCK_N": 256, "needs_accumulator": True}
GIB = 1 << 30


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Its free memory, what the allocator holds of it unused, whether a graph is captured, and questions asked."""
    state = SimpleNamespace(free=60 * GIB, unused=0, capturing=False, asked=0)

    def mem_get_info(device: torch.device) -> tuple[int, int]:
        assert not state.capturing, "not allowed while a graph is captured"
        state.asked += 1
        return state.free, 80 * GIB

    monkeypatch.setattr(memory, "_spare", {})
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7 * GIB + state.unused)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 7 * GIB)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * GIB))
    return state


def choose(workspace: str = "auto", rows: int = 32768, device: torch.device = CARD, **ranks: bool) -> str:
    return memory.choose_workspace(workspace, device, rows, 32768, 4096, BF16, **HOW, **ranks)


def test_auto_goes_by_what_is_free_or_held_unused(card: SimpleNamespace) -> None:
    needed = 3_003_121_664  # bytes of "fast" for this shape
    for free, unused, expected in ((4 * needed, 0, "fast"), (0, 4 * needed, "fast"), (4 * needed - 1, 0, "small")):
        memory._spare.clear()
        card.free, card.unused = free, unused
        assert choose() == expected


def test_one_answer_a_process(card: SimpleNamespace) -> None:
    assert choose() == "fast"
    card.free = 0
    assert choose() == "fast" and card.asked == 1


def test_nothing_is_asked_where_there_is_no_choice(card: SimpleNamespace) -> None:
    assert choose(rows=6272) == "small"
    assert choose("fast") == "fast" and choose("small") == "small"
    assert choose(several_ranks=True) == "small" and choose("fast", several_ranks=True) == "fast"
    assert choose(device=torch.device("cpu")) == "small"
    assert card.asked == 0


def test_a_graph_takes_the_known_answer_or_half_of_the_card(card: SimpleNamespace) -> None:
    card.capturing = True
    assert choose() == "fast" and memory.spare_bytes(CARD) == 40 * GIB
    card.capturing, card.free = False, 0
    assert choose() == "fast" and card.asked == 0
    memory._spare.clear()
    assert choose() == "small"
    card.capturing = True
    assert choose() == "small"


def test_report(card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "configs_for", lambda device: SimpleNamespace(forward=SimpleNamespace(BLOCK_N=256)))
    report = memory.workspace_report(32768, 184622, 4096, device=CARD)
    assert report.pop("sum_share") == pytest.approx(0.0153, abs=1e-4)
    assert report == {
        "workspace": "fast",
        "chunks": 3,
        "chunk_rows": 11008,
        "split_accumulator": True,
        "bytes": 5_220_706_304,
    }
    own = memory.workspace_report(32768, 32768, 1024, device=CARD, chunk_bytes=1 << 26)
    assert own["workspace"] == "chunk_bytes" and own["chunk_rows"] == 1024


def test_falls_back_where_the_memory_is_gone(
    card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Training has filled the card since it was asked: "auto" must not fail where "small" would not."""
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", 1)
    monkeypatch.setattr(chunks, "MIN_ROWS", 50)
    cpu = torch.device("cpu")
    monkeypatch.setattr(
        chunk_loop,
        "choose_workspace",
        lambda workspace, *a, **k: "small" if memory._spare.get(cpu) == 0 or workspace == "small" else "fast",
    )
    rows, weight = draw_rows(dtype=BF16)
    planned, allocate = [], chunk_loop._Buffers.allocate

    def short_of_memory(plan: chunk_loop._Plan, *arguments: Any) -> chunk_loop._Buffers:
        planned.append(plan.workspace)
        if plan.workspace == "fast":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return allocate(plan, *arguments)

    monkeypatch.setattr(chunk_loop._Buffers, "allocate", short_of_memory)
    with caplog.at_level(logging.WARNING, "ntpseg.kernels"):
        result = run(rows, weight, LossOptions(), LoopOptions(fused=True))
        run(rows, weight, LossOptions(), LoopOptions(fused=True))
    assert planned == ["fast", "small", "small"]
    assert len(caplog.messages) == 1 and "'small' from here on" in caplog.messages[0]
    assert torch.isfinite(result.d_weight).all()
    with pytest.raises(torch.OutOfMemoryError):
        memory._spare.clear()
        run(rows, weight, LossOptions(), LoopOptions(fused=True, workspace="fast"))


@pytest.mark.parametrize("workspace", ["auto", "small", "fast"])
def test_the_option_reaches_the_loop(workspace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(triton_backend, "run_segment", lambda segment, weight, result, loop, shard: seen.append(loop))
    run(*draw_rows(dtype=BF16), LossOptions(workspace=workspace, chunk_bytes=5000))
    assert [(loop.workspace, loop.chunk_bytes) for loop in seen] == [(workspace, 5000)]


def test_without_a_gradient_of_the_weight_there_is_nothing_to_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(chunk_loop, "choose_workspace", lambda workspace, *a, **k: asked.append(workspace) or "small")
    rows, weight = draw_rows(dtype=BF16)
    for weight_grad, loop in ((True, None), (False, None), (True, LoopOptions(chunk_bytes=50_000, workspace="fast"))):
        triton_backend.rows_loss(
            rows, weight, LossOptions(workspace="fast"), hidden_grad=True, weight_grad=weight_grad, loop=loop
        )
    assert asked == ["fast", "small", "small"]


def test_the_workspace_reaches_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "WORKSPACE_BYTES", 1)
    monkeypatch.setattr(chunks, "MIN_ROWS", 64)
    monkeypatch.setattr(chunks, "_SINGLE_CHUNK_EXCESS", 0)
    planned = []
    monkeypatch.setattr(
        chunk_loop, "plan_chunks", lambda *a, **k: planned.append(chunks.plan_chunks(*a, **k)) or planned[-1]
    )
    rows, weight = draw_rows(dtype=BF16, leaders=True)
    results = [
        run(rows, weight, LossOptions(), LoopOptions(fused=True, workspace=workspace))
        for workspace in ("auto", "small", "fast")
    ]
    assert [plan.count for plan in planned] == [3, 3, 1]
    for result in results[1:]:
        assert torch.equal(result.prediction, results[0].prediction)
        torch.testing.assert_close(result.nll, results[0].nll, rtol=1e-5, atol=1e-6)
        error = (result.d_weight.double() - results[0].d_weight.double()).norm() / results[0].d_weight.double().norm()
        assert error < 3e-3
