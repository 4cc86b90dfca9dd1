"""The native operators as PyTorch sees them, on every instruction set of this machine, and the package without them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from native_extension import native

from ntpseg.ops import extension_status, topn_errors


def memory_tensors(samples: int, n: int) -> tuple[torch.Tensor, ...]:
    return (
        torch.zeros(2, samples, 3, n, dtype=torch.int32),
        torch.zeros(2, samples, dtype=torch.int32),
        torch.zeros(5, dtype=torch.int32),
        torch.ones((), dtype=torch.int64),
    )


def test_opcheck_topn_errors() -> None:
    torch.library.opcheck(torch.ops.ntpseg.topn_errors, (torch.rand(3, 40), torch.rand(3, 40) < 0.5, 7))


def test_opcheck_record_errors() -> None:
    prediction, labels = torch.randint(0, 9, (2, 3, 40))
    arguments = (*memory_tensors(8, 4), torch.tensor([1, 5, 1]), prediction, labels, torch.rand(3, 40), -100)
    torch.library.opcheck(torch.ops.ntpseg.record_errors, arguments)


def test_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(lambda d, e: topn_errors(d * 2, e, 5), fullgraph=True, backend="aot_eager")
    deviation, is_error = torch.rand(3, 40), torch.rand(3, 40) < 0.5
    expected = topn_errors(deviation * 2, is_error, 5)
    result = compiled(deviation, is_error)
    assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])


def test_malformed_tensors_are_refused_natively() -> None:
    with pytest.raises(RuntimeError, match="is_error must have the shape"):
        torch.ops.ntpseg.topn_errors(torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.bool), 1)
    with pytest.raises(RuntimeError, match="deviation must be contiguous"):
        torch.ops.ntpseg.topn_errors(torch.zeros(3, 2).t(), torch.zeros(2, 3, dtype=torch.bool), 1)
    tensors = memory_tensors(8, 4)
    batch = torch.zeros(2, 6, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="sample_ids must be"):
        torch.ops.ntpseg.record_errors(*tensors, torch.tensor([1]), batch, batch, batch.float(), -100)


def test_status_names_both_devices() -> None:
    assert extension_status().splitlines()[0] == "cpu: native"
    assert extension_status().splitlines()[1].startswith("cuda: ")


def test_without_the_extension_everything_still_runs() -> None:
    script = (
        "import torch, ntpseg\n"
        "from ntpseg.ops import extension_status, topn_errors\n"
        "m = ntpseg.HardTokenMemory(3, 2)\n"
        "m.record(torch.tensor([1]), torch.tensor([[4, 5]]), torch.tensor([[4, 6]]), torch.ones(1, 2))\n"
        "m.advance()\n"
        "assert m.lookup(torch.tensor([1])).token.tolist() == [[5, -1]]\n"
        "assert topn_errors(torch.ones(1, 2), torch.tensor([[False, True]]), 1)[1].tolist() == [[1]]\n"
        "print(extension_status())\n"
    )
    environment = {**os.environ, "NTPSEG_DISABLE_NATIVE": "1"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "cpu: plain PyTorch (NTPSEG_DISABLE_NATIVE is set)" in result.stdout


def test_both_paths_say_the_same() -> None:
    deviation, is_error = torch.rand(3, 40), torch.rand(3, 40) < 0.5
    result = []
    for expected in (True, False):
        with native(expected):
            result.append(topn_errors(deviation, is_error, 7))
    assert torch.equal(result[0][0], result[1][0]) and torch.equal(result[0][1], result[1][1])
