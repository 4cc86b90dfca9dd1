"""The ping-pong product on a Hopper GPU, against float64 and against the product that it would replace."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from ntpseg.kernels.anchored_gemm import anchored_gemm
from ntpseg.kernels.chunk_loop import LoopOptions, Segment, SegmentResult, run_segment
from ntpseg.kernels.gemm_configs import GEMM_CONFIGS, PINGPONG_CONFIGS, GemmConfig, persistent_grid
from ntpseg.kernels.workspace import Anchors, BlockStats, LossWeights, RowStats

pytestmark = [
    pytest.mark.gpu,
    # a wrong order of the barriers would hang, where no signal reaches Python
    pytest.mark.timeout(20, method="thread"),
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs sm_90"
    ),
]

BF16, F16 = torch.bfloat16, torch.float16
CONFIGS = pytest.mark.parametrize("config", PINGPONG_CONFIGS, ids=["128x128", "64x256"])
LOG2E = 1 / math.log(2)


@dataclasses.dataclass(frozen=True)
class Result:
    """What one launch wrote; -3 where it wrote nothing."""

    e: torch.Tensor
    stats: BlockStats


def _operands(rows: int, classes: int, width: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    make = torch.Generator("cuda").manual_seed(rows + classes)
    hidden = (torch.randn(rows, width, device="cuda", generator=make) * scale).to(dtype)
    weight = (torch.randn(classes, width, device="cuda", generator=make) * width**-0.5).to(dtype)
    return hidden, weight, hidden.double() @ weight.double().t()


def _run(
    config: GemmConfig,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    anchors: Anchors,
    *,
    store: bool = True,
    chosen: list[int] | None = None,
    programs: int | None = None,
) -> Result:
    rows, classes = len(hidden), len(weight)
    blocks, row_blocks = -(-classes // config.BLOCK_N), -(-rows // config.BLOCK_M)
    shape = (blocks, rows)
    stats = BlockStats(
        torch.full(shape, -3.0, device="cuda"),
        torch.full(shape, -3.0, device="cuda"),
        torch.full(shape, -3, dtype=torch.int32, device="cuda"),
    )
    e = torch.full((rows, -(-classes // 64) * 64), -3.0, dtype=hidden.dtype, device="cuda")
    listed = list(range(row_blocks)) if chosen is None else chosen
    indices = torch.tensor([*listed, 1 << 20], dtype=torch.int32, device="cuda")  # behind the count: never read
    count = torch.tensor(len(listed), dtype=torch.int32, device="cuda")
    programs = programs or persistent_grid(config, row_blocks * blocks, hidden.device)
    anchored_gemm(hidden, weight, e if store else None, anchors, stats, indices, count, config, programs)
    torch.cuda.synchronize()
    return Result(e, stats)


def _anchors(z: torch.Tensor, gap: float = 48.0) -> Anchors:
    target = z[:, 0].float()
    return Anchors(target, target * LOG2E, target + gap)


def _assert_right(result: Result, z: torch.Tensor, anchors: Anchors, config: GemmConfig, *, store: bool = True) -> None:
    classes = z.shape[1]
    slack = 1e-4 + 1e-5 * float(z.abs().max())  # of a logit, summed in fp32 on tensor cores
    eps = 2.0**-8 if result.e.dtype == BF16 else 2.0**-11
    for block in range(result.stats.row_sum.shape[0]):
        cut = slice(block * config.BLOCK_N, min((block + 1) * config.BLOCK_N, classes))
        row_max = z[:, cut].amax(1)
        anchor = torch.where(result.stats.row_max[block] > anchors.limit, row_max, anchors.target_logit.double())
        expected = torch.exp(z[:, cut] - anchor[:, None])
        torch.testing.assert_close(result.stats.row_max[block].double(), row_max, rtol=0, atol=slack)
        torch.testing.assert_close(result.stats.row_sum[block].double(), expected.sum(1), rtol=2 * slack, atol=0)
        # a tie within the rounding of fp32 sums may fall either way
        argmax = result.stats.argmax[block].long() - cut.start
        assert ((argmax >= 0) & (argmax < cut.stop - cut.start)).all()
        assert (row_max - z[:, cut].gather(1, argmax[:, None])[:, 0]).max() < 2 * slack
        if store:
            torch.testing.assert_close(result.e[:, cut].double(), expected, rtol=eps + 2 * slack, atol=1e-6)
    assert not result.e[:, classes:].any() if store else (result.e == -3).all()


@CONFIGS
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    ("rows", "classes", "width"),
    # one tile, fewer tiles than programs, odd numbers of them, D below and beside the block, whole blocks, many tiles
    [(1, 130, 8), (64, 256, 64), (333, 1000, 72), (129, 5003, 1000), (256, 4096, 512), (1500, 20011, 200)],
)
def test_agrees_with_float64(config: GemmConfig, dtype: torch.dtype, rows: int, classes: int, width: int) -> None:
    hidden, weight, z = _operands(rows, classes, width, dtype)
    anchors = _anchors(z)
    _assert_right(_run(config, hidden, weight, anchors), z, anchors, config)


@CONFIGS
@pytest.mark.parametrize("programs", [1, 2, 3, 7, 131])
def test_any_number_of_tiles_per_program(config: GemmConfig, programs: int) -> None:
    hidden, weight, z = _operands(300, 1900, 136, BF16)
    anchors = _anchors(z)
    _assert_right(_run(config, hidden, weight, anchors, programs=programs), z, anchors, config)


@CONFIGS
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 6, 11])
def test_any_depth(config: GemmConfig, depth: int) -> None:
    hidden, weight, z = _operands(300, 1900, 64 * depth, BF16)
    anchors = _anchors(z)
    _assert_right(_run(config, hidden, weight, anchors, programs=5), z, anchors, config)


@CONFIGS
def test_statistics_alone(config: GemmConfig) -> None:
    hidden, weight, z = _operands(300, 1900, 136, BF16)
    anchors = _anchors(z)
    _assert_right(_run(config, hidden, weight, anchors, store=False), z, anchors, config, store=False)


@CONFIGS
@pytest.mark.parametrize("chosen", [[], [1], [2, 0]])
def test_only_the_listed_row_blocks_are_written(config: GemmConfig, chosen: list[int]) -> None:
    hidden, weight, z = _operands(3 * config.BLOCK_M - 5, 1900, 136, BF16)
    anchors = _anchors(z)
    whole = _run(config, hidden, weight, anchors)
    result = _run(config, hidden, weight, anchors, chosen=chosen)
    done = torch.zeros(len(hidden), dtype=torch.bool, device="cuda")
    for block in chosen:
        done[block * config.BLOCK_M : (block + 1) * config.BLOCK_M] = True
    assert torch.equal(result.e[done], whole.e[done]) and (result.e[~done] == -3).all()
    for name in ("row_sum", "row_max", "argmax"):
        part, all_of_it = getattr(result.stats, name), getattr(whole.stats, name)
        assert torch.equal(part[:, done], all_of_it[:, done]) and (part[:, ~done] == -3).all(), name


@CONFIGS
def test_a_tile_above_the_limit_is_its_own_anchor(config: GemmConfig) -> None:
    for dtype, gap, scale in ((BF16, 48.0, 30.0), (F16, 10.0, 8.0)):
        hidden, weight, z = _operands(300, 1900, 136, dtype, scale)
        anchors = _anchors(z, gap)
        assert (z.amax(1) > anchors.limit).any()
        result = _run(config, hidden, weight, anchors)
        assert result.e.isfinite().all()
        _assert_right(result, z, anchors, config)


@CONFIGS
def test_repeats_bit_for_bit_and_equals_the_other_product(config: GemmConfig) -> None:
    """A race between the warps would show as a difference."""
    hidden, weight, z = _operands(2000, 8192, 1024, BF16)
    anchors = _anchors(z)
    first = _run(config, hidden, weight, anchors)
    for _ in range(10):
        again = _run(config, hidden, weight, anchors)
        assert torch.equal(again.e, first.e) and torch.equal(again.stats.row_sum, first.stats.row_sum)
    other = _run(GEMM_CONFIGS["sm_90"].forward, hidden, weight, anchors)
    assert (other.e.double() - first.e.double()).norm() < 1e-3 * first.e.double().norm()
    torch.testing.assert_close(other.stats.row_max.amax(0), first.stats.row_max.amax(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(other.stats.row_sum.sum(0), first.stats.row_sum.sum(0), rtol=1e-4, atol=0)


@CONFIGS
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("scale", [1.0, 20.0])  # 20: anchors overflow, and row blocks are computed again
def test_the_whole_loss_is_that_of_the_other_product(config: GemmConfig, dtype: torch.dtype, scale: float) -> None:
    rows, classes, width = 700, 3000, 256
    hidden, weight, _ = _operands(rows, classes, width, dtype, scale)
    target = torch.arange(rows, device="cuda") % classes
    gradient_dtype = torch.float32 if dtype == F16 else dtype
    results = []
    for forward in (GEMM_CONFIGS["sm_90"].forward, config):
        segment = Segment(
            hidden=hidden,
            target=target,
            num_negatives=torch.zeros(rows, dtype=torch.int32, device="cuda"),
            hard_tokens=torch.full((rows, 1), -1, device="cuda"),
            weights=LossWeights(torch.full((rows,), 1e-2, device="cuda"), torch.ones((), device="cuda"), 1, 1, 0, 1),
            negatives=0,
        )
        result = SegmentResult(
            RowStats.empty(rows, hidden.device),
            torch.empty(rows, device="cuda"),
            torch.empty(rows, device="cuda"),
            torch.empty(rows, width, dtype=gradient_dtype, device="cuda"),
            torch.empty(classes, width, dtype=gradient_dtype, device="cuda"),
        )
        configs = dataclasses.replace(GEMM_CONFIGS["sm_90"], forward=forward)
        run_segment(segment, weight, result, LoopOptions(configs=configs))
        results.append(result)
    expected, found = results
    torch.testing.assert_close(found.row_stats.nll, expected.row_stats.nll, rtol=1e-5, atol=1e-4)
    for name in ("d_hidden", "d_weight"):
        truth, gradient = getattr(expected, name).double(), getattr(found, name).double()
        assert gradient.isfinite().all() and (gradient - truth).norm() < 4e-3 * truth.norm(), name
