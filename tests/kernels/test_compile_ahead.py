"""Every kernel that the launchers can choose compiles for every architecture and uses the chip as meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

_ROOT = Path(__file__).parents[2]
_SCRIPT = Path(__file__).with_name("compile_ahead.py")
# dynamic shared memory that one block may have (CUDA C++ programming guide, table of compute capabilities)
_SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
_INSTRUCTION = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}
_PRODUCTS = {"anchored_gemm_kernel", "filtered_d_hidden_kernel", "filtered_d_weight_kernel"}
_OTHERS = {
    "indexed_dot_kernel",
    "row_reduce_kernel",
    "recompute_blocks_kernel",
    "contrastive_tokens_kernel",
    "contrastive_kernel",
    "scale_rows_kernel",
    "split_accumulate_kernel",
    "find_supervised_kernel",
    "write_rows_kernel",
    "count_hard_tokens_kernel",
    "rank_hard_tokens_kernel",
    "hard_token_table_kernel",
    "gather_rows_kernel",
    "gather_rows_dot_kernel",
    "zero_missing_rows_kernel",
    "scatter_results_kernel",
    "scale_kernel",
    "loss_terms_kernel",
    "logits_stats_kernel",
    "logits_exp_kernel",
    "mark_probable_kernel",
    "mark_tokens_kernel",
    "active_indices_kernel",
}


def _compile(cache: Path, *arguments: str) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(_SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=560
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_every_choice_compiles_without_spills_onto_tensor_cores(architecture: str, tmp_path: Path) -> None:
    result = _compile(tmp_path, architecture)
    assert {kernel["kernel"] for kernel in result} == _PRODUCTS | _OTHERS
    for kernel in result:
        shown = {name: kernel[name] for name in ("kernel", "operand", "constants", "options")}
        assert kernel["stack"] == 0 and kernel["local"] == 0, ("registers spill", shown)
        assert kernel["shared"] <= _SHARED[architecture], (kernel["shared"], shown)
        assert kernel["registers"] <= 255
        if kernel["kernel"] in _PRODUCTS:
            assert kernel[_INSTRUCTION[architecture]] > 0, ("no tensor-core product", shown)
            if architecture == "sm_80":
                assert kernel["async_copies"] > 0, ("no asynchronous copies", shown)
            else:
                assert kernel["bulk_copies"] > 0, ("no tensor-memory copies", shown)
                assert kernel["mma"] == 0, ("the slow product of an older chip", shown)
    operands = {kernel["operand"].split("[")[0] for kernel in result if kernel["kernel"] == "anchored_gemm_kernel"}
    assert len(operands) == 2, operands  # bf16 and fp16


def test_a_spill_would_be_seen(tmp_path: Path) -> None:
    (starved,) = _compile(tmp_path, "sm_80", "starve")
    assert starved["registers"] <= 64
    assert starved["stack"] > 0


def test_rows_that_start_anywhere_are_compiled_for_once(tmp_path: Path) -> None:
    aligned, *others = _compile(tmp_path, "sm_90", "starts")
    assert {name.split("{")[0] for name in aligned} >= {"row_reduce_kernel", "contrastive_kernel", "scale_rows_kernel"}
    for found in others:
        assert set(found) == set(aligned)
