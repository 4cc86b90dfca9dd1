"""The sharded vocabulary on two ranks equals the whole one on one."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from loss_cases import PARTS, draw, error
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from ntpseg import ntp_loss

interpreter = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="CPU tensors need Triton's interpreter",
)
CASES = {
    "plain": {},
    "per head": {"per_head": True, "negatives": 9},
    "range within one rank": {"vocab_range": (1, 5)},
    "range over both": {"vocab_range": (3, 16), "slots": 9},
    "blocks": {"chunk_bytes": 500, "temperature": 0.5, "head_weights": (0.0, 1.0, 0.5)},
    "far targets": {"scale": 40.0, "z_loss": 0.01},
    "nothing supervised": {"unsupervised": 1.0},
    "one rank has no shard": {"slots": 2},
    "filtered": {"gradient_filter": 1e-300},
    "bfloat16": {"dtype": torch.bfloat16, "width": 32, "negatives": 0},
    "bfloat16 in one rank": {"dtype": torch.bfloat16, "width": 32, "vocab_range": (7, 15), "negatives": 3},
    "scaled": {"logit_scale": 0.3},
    "capped": {"softcap": 3.0, "logit_scale": 0.5, "chunk_bytes": 500},
}


# the same in fp32 for the kernels, which leave float64 to PyTorch
FOR_KERNELS = {name: {"dtype": torch.float32, "width": 16} | case for name, case in CASES.items() if name != "capped"}
FOR_KERNELS |= {
    "one rank holds nothing": {"dtype": torch.float32, "vocab_range": (7, 15), "negatives": 3},
    "filtered tiles": {"dtype": torch.bfloat16, "width": 16, "negatives": 3, "gradient_filter": 1e-30},
    "unaligned rows": {"dtype": torch.bfloat16, "width": 11, "negatives": 0},
}


def _rank(rank: int, store: str, folder: str, backend: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", world_size=2, rank=rank)
    group = dist.new_group([0, 1])
    for number, (name, keywords) in enumerate((FOR_KERNELS if backend == "triton" else CASES).items()):
        case = draw(**keywords)
        split = 0 if name == "one rank has no shard" else 6
        weight = case.weight[..., (slice(0, split), slice(split, None))[rank], :].clone().requires_grad_()
        hidden = case.hidden.clone().requires_grad_()
        options = case.options.with_backend(backend)
        out = ntp_loss(hidden, weight, case.labels, group=group, options=options, **case.tensors)
        out.loss.backward()
        torch.save(
            (
                {part: getattr(out, part).detach() for part in (*PARTS, "prediction", "nll", "margin")},
                hidden.grad,
                weight.grad,
            ),
            Path(folder) / f"{number}-{rank}.pt",
        )
    with pytest.raises(ValueError, match=r"^backend must"):
        ntp_loss(hidden, weight, case.labels, group=group, backend="reference")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=interpreter)])
def test_two_ranks_equal_one(backend: str, tmp_path: Path) -> None:
    mp.spawn(_rank, (str(tmp_path / "store"), str(tmp_path), backend), nprocs=2)
    for number, (name, keywords) in enumerate((FOR_KERNELS if backend == "triton" else CASES).items()):
        case = draw(**keywords)
        tolerance = {torch.bfloat16: 1e-2, torch.float32: 2e-5, torch.float64: 1e-12}[case.hidden.dtype]
        whole, d_hidden, d_weight = case.run("torch" if backend == "torch" else "reference", torch.float64)
        ranks = [torch.load(tmp_path / f"{number}-{rank}.pt") for rank in (0, 1)]
        for values, d_rank, _ in ranks:
            for part, value in values.items():
                expected = getattr(whole, part).to(value.dtype)
                assert torch.allclose(value, expected, rtol=tolerance, atol=tolerance), (name, part)
            assert error(d_rank, d_hidden) < tolerance, name
        assert torch.equal(ranks[0][1], ranks[1][1]), name
        assert error(torch.cat([ranks[0][2], ranks[1][2]], -2), d_weight) < tolerance, name


def _sharded_rank(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", world_size=2, rank=rank)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("vocabulary",))
    case = draw(k=1, logit_scale=0.5)
    weight = distribute_tensor(case.weight, mesh, [Shard(0)]).requires_grad_()
    hidden = case.hidden.clone().requires_grad_()
    ntp_loss(hidden, weight, case.labels, options=case.options, **case.tensors).loss.backward()
    assert weight.grad.placements == (Shard(0),)
    torch.save((hidden.grad, weight.grad.full_tensor()), Path(folder) / f"{rank}.pt")
    with pytest.raises(ValueError, match=r"hidden and labels must be the same on all ranks .* FSDP"):
        ntp_loss(hidden.detach() + rank, weight, case.labels, options=case.options)
    with pytest.raises(ValueError, match=r"full_tensor\(\)"):
        ntp_loss(hidden, distribute_tensor(case.weight, mesh, [Shard(1)]), case.labels, options=case.options)
    # A step whose loss is no number is the caller's to skip, and no difference between ranks.
    broken = torch.full_like(case.hidden, float("nan"))
    assert ntp_loss(broken, weight, case.labels, options=case.options).loss.isnan()
    with pytest.raises(ValueError, match=r"hidden and labels must be plain tensors, got DTensors"):
        ntp_loss(distribute_tensor(case.hidden, mesh, [Replicate()]), case.weight, case.labels, options=case.options)
    with pytest.raises(ValueError, match=r"group must be None with a DTensor weight"):
        ntp_loss(hidden, weight, case.labels, group=dist.group.WORLD, options=case.options)
    dist.barrier()
    dist.destroy_process_group()


def test_a_sharded_dtensor_brings_its_group(tmp_path: Path) -> None:
    mp.spawn(_sharded_rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    _, d_hidden, d_weight = draw(k=1, logit_scale=0.5).run("torch")
    for rank in (0, 1):
        found_hidden, found_weight = torch.load(tmp_path / f"{rank}.pt")
        assert error(found_hidden, d_hidden) < 1e-12
        assert error(found_weight, d_weight) < 1e-12
