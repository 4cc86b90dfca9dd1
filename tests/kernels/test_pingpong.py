"""The ping-pong product's own source, run on a model of warps, mbarriers and asynchronous copies."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from gluon_simulator import Deadlock, SimulatedKernel

from ntpseg.kernels import pingpong_gemm
from ntpseg.kernels.anchored_gemm import anchored_gemm
from ntpseg.kernels.gemm_configs import GEMM_CONFIGS, PINGPONG_CONFIGS, GemmConfig
from ntpseg.kernels.workspace import Anchors, BlockStats

LOG2E = 1 / math.log(2)
KERNEL = pingpong_gemm.pingpong_gemm_kernel


def _config(stages: int = 3, tile: tuple[int, int, int] = (16, 32, 16), group: int = 2) -> GemmConfig:
    return GemmConfig(*tile, num_warps=4, num_stages=stages, TMA=True, GROUP_SIZE_M=group, PINGPONG=True)


def _check(
    monkeypatch: pytest.MonkeyPatch,
    config: GemmConfig,
    rows: int,
    classes: int,
    width: int,
    *,
    programs: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    store: bool = True,
    chosen: list[int] | None = None,
    gap: float = 48.0,
    scale: float = 1.0,
    seed: int = 0,
    edit: tuple[str, str] | None = None,
) -> None:
    """Runs the product and compares all that it writes, and what it must leave alone, with float64."""
    monkeypatch.setattr(pingpong_gemm, "pingpong_gemm_kernel", SimulatedKernel(KERNEL, seed, edit))
    make = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(rows, width, generator=make) * scale).to(dtype)
    weight = torch.randn(classes, width, generator=make).to(dtype)
    z = hidden.double() @ weight.double().t()
    target = z[:, 0].float()
    anchors = Anchors(target, target * LOG2E, target + gap)
    row_blocks = -(-rows // config.BLOCK_M)
    listed = list(range(row_blocks)) if chosen is None else chosen
    blocks = -(-classes // config.BLOCK_N)
    stats = BlockStats(
        torch.full((blocks, rows), -3.0), torch.full((blocks, rows), -3.0), torch.full((blocks, rows), -3).int()
    )
    stride = -(-classes // 8) * 8  # shorter than the last block: what lies behind is clipped
    e = torch.full((rows, stride), -3.0, dtype=dtype)
    # what lies behind the count is not read
    indices = torch.tensor([*listed, 77, 77], dtype=torch.int32)
    count = torch.tensor(len(listed), dtype=torch.int32)
    lists = (indices, count)
    if chosen is None and seed % 3:
        lists = (None, count) if seed % 3 == 1 else (None, None)
    pingpong_gemm.pingpong_gemm(hidden, weight, e if store else None, anchors, stats, *lists, config, programs)

    done = torch.zeros(rows, dtype=torch.bool)
    for block in listed:
        done[block * config.BLOCK_M : (block + 1) * config.BLOCK_M] = True
    assert (e[~done] == -3).all() and (store or (e == -3).all())
    for block in range(blocks):
        cut = slice(block * config.BLOCK_N, min((block + 1) * config.BLOCK_N, classes))
        row_max = z[:, cut].amax(1)
        anchor = torch.where(row_max > anchors.limit, row_max, target.double())
        expected = torch.exp(z[:, cut] - anchor[:, None])
        torch.testing.assert_close(stats.row_max[block][done], row_max[done].float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stats.row_sum[block][done], expected.sum(1)[done].float(), rtol=1e-4, atol=0)
        assert torch.equal(stats.argmax[block][done].long(), z[:, cut].argmax(1)[done] + cut.start)
        for part in (stats.row_sum, stats.row_max, stats.argmax):
            assert (part[block][~done] == -3).all()
        if store:
            torch.testing.assert_close(e[done][:, cut].double(), expected[done], rtol=8e-3, atol=1e-6)
    if store:
        assert not e[done][:, classes:].any()


@pytest.mark.parametrize("stages", [2, 3, 5])
@pytest.mark.parametrize("depth", [1, 2, 3, 7])
def test_every_number_of_tiles_in_any_order_of_events(monkeypatch: pytest.MonkeyPatch, stages: int, depth: int) -> None:
    for tiles in range(1, 8):  # of one program: odd and even numbers for the two consumers
        for seed in range(3):
            _check(monkeypatch, _config(stages), 16, 32 * tiles, 16 * depth, seed=10 * tiles + seed)


@pytest.mark.parametrize("programs", [1, 2, 5, 30])
def test_ragged_operands(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    for rows, classes, width, group in ((37, 150, 40, 2), (16, 97, 8, 8), (5, 33, 56, 1), (100, 64, 16, 3)):
        _check(monkeypatch, _config(group=group), rows, classes, width, programs=programs, seed=programs)


@pytest.mark.parametrize("chosen", [[], [2], [4, 1, 3]])
@pytest.mark.parametrize("store", [True, False])
def test_only_the_listed_row_blocks_are_computed(
    monkeypatch: pytest.MonkeyPatch, chosen: list[int], store: bool
) -> None:
    _check(monkeypatch, _config(), 75, 100, 48, programs=3, chosen=chosen, store=store)


def test_a_tile_above_the_limit_is_its_own_anchor(monkeypatch: pytest.MonkeyPatch) -> None:
    _check(monkeypatch, _config(), 40, 100, 48, gap=1.0, dtype=torch.float16)
    _check(monkeypatch, _config(), 40, 100, 64, gap=10.0, dtype=torch.float16, scale=8.0)


@pytest.mark.parametrize("config", PINGPONG_CONFIGS, ids=["128x128", "64x256"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_tiles_that_a_gpu_would_run(
    monkeypatch: pytest.MonkeyPatch, config: GemmConfig, dtype: torch.dtype
) -> None:
    _check(monkeypatch, config, 150, 700, 200, programs=2, dtype=dtype, gap=4.0 if dtype == torch.float16 else 48.0)


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(("mbarrier.wait(turn.index(WHO), parity)", "pass"), id="no turns"),
        pytest.param(("parity = WHO ^ 1", "parity = WHO"), id="nobody begins"),
        pytest.param(("mbarrier.arrive(turn.index(1 - WHO), count=1)", "pass"), id="turn kept"),
        pytest.param(("(step + NUM_STAGES - 1) % NUM_STAGES), count=1, pred=k > 0)", "stage))"), id="early release"),
        pytest.param(("(step // NUM_STAGES & 1) ^ 1", "1"), id="no wait for empty stages"),
        pytest.param(("step += depth", "pass"), id="the other's steps forgotten"),
        pytest.param(("tma.store_wait(0)  #", "#"), id="staging overwritten"),
    ],
)
def test_a_fault_in_the_protocol_would_be_seen(monkeypatch: pytest.MonkeyPatch, edit: tuple[str, str]) -> None:
    def run() -> None:
        for seed in range(40):
            _check(monkeypatch, _config(), 16, 32 * 6, 16 * (1 + seed % 7), seed=seed, edit=edit)

    with pytest.raises((AssertionError, Deadlock)):
        run()


def test_a_ring_of_one_stage_is_refused_and_would_stand_still(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="num_stages must be at least 2"):
        _check(monkeypatch, _config(stages=1), 16, 32, 64)
    monkeypatch.setattr(pingpong_gemm, "MIN_STAGES", 1)
    with pytest.raises(Deadlock):
        _check(monkeypatch, _config(stages=1), 16, 32, 64)


def test_other_dtypes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match=r"hidden must be bfloat16 or float16 .* got torch\.float32"):
        _check(monkeypatch, _config(), 16, 32, 64, dtype=torch.float32)


def test_anchored_gemm_leaves_it_to_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[object, ...]] = []
    monkeypatch.setattr(pingpong_gemm, "pingpong_gemm", lambda *args: given.append(args))
    args = (torch.zeros(16, 16), torch.zeros(32, 16), None, None, None, None, None, _config(), 3)
    anchored_gemm(*args)
    assert given == [args]


def test_no_architecture_chooses_it_yet() -> None:
    assert not any(config.forward.PINGPONG for config in GEMM_CONFIGS.values())
