"""A fused model whose weights are sharded: the check waits for the first labelled call; losses and gradients stay."""

from __future__ import annotations

import importlib.util
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_llama import SIZES, batch, build
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from ntpseg.losses import lm_head, ntp_loss
from ntpseg.losses.huggingface import fuse_causal_lm

WAYS = ("head in a group of its own", "head in the root's group", "fused before")


def part(rank: int) -> dict[str, torch.Tensor]:
    """This rank's row of the batch; both rows supervise as many tokens."""
    return {name: value[rank : rank + 1] for name, value in batch().items()}


def sharded(way: str) -> Any:
    """The fused model, sharded over the ranks."""
    mesh = init_device_mesh("cpu", (2,))
    model = build()
    if way == "fused before":
        fuse_causal_lm(model, negatives=0)
        model.ntp_fusion.check_pending = True
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if way != "head in the root's group":
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if way != "fused before":
        fuse_causal_lm(model, negatives=0)
        assert model.ntp_fusion.check_pending
    return model


def _fully_shard(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", world_size=2, rank=rank)
    for way in WAYS:
        model = sharded(way)
        for _ in range(2):
            model.zero_grad()
            model(**part(rank)).loss.backward()
        assert not model.ntp_fusion.check_pending
        grads = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        torch.save(grads, Path(folder) / f"{way}-{rank}.pt")
        model.eval()
        assert model(**part(rank)).logits.shape == (1, 11, 97)

    broken = sharded(WAYS[0])
    lm_head.ntp_loss = lambda hidden, *args, **keywords: ntp_loss(1.1 * hidden, *args, **keywords)
    with pytest.raises(ValueError, match="the fused loss must be the model's own"):
        broken(**part(rank))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_fully_shard(tmp_path: Path) -> None:
    mp.spawn(_fully_shard, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    model = build()
    model(**batch()).loss.backward()
    for way in WAYS:
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{way}-{rank}.pt")
            for name, parameter in model.named_parameters():
                assert torch.allclose(found[name], parameter.grad, rtol=1e-4, atol=1e-6), (way, name)


def _zero3(rank: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    os.environ |= {"MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    from accelerate.state import AcceleratorState, GradientState

    from ntpseg.training.distributed import deepspeed_config, prepare_deepspeed

    torch.set_num_threads(1)
    prepare_deepspeed()
    losses = {}
    for fused in (False, True):
        zero = deepspeed_config("zero3")
        assert zero is not None
        zero["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        training = TrainingArguments(
            f"{folder}/{fused}",
            max_steps=3,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            logging_steps=1,
            learning_rate=1e-2,
            deepspeed=zero,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        torch.manual_seed(0)
        model = LlamaForCausalLM._from_config(LlamaConfig(**SIZES))
        if fused:
            fuse_causal_lm(model, negatives=0)
            assert model.ntp_fusion.check_pending
        rows = [{name: value[index % 2] for name, value in batch().items()} for index in range(16)]
        trainer = Trainer(model, training, train_dataset=rows)
        trainer.train()
        if fused:
            assert not model.ntp_fusion.check_pending
        losses[fused] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        AcceleratorState._reset_state()
        GradientState._reset_state()
        dist.barrier()
    torch.save(losses, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero3(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(_zero3, (port, str(tmp_path)), nprocs=2)
    losses = torch.load(tmp_path / "0.pt")
    assert len(losses[True]) == 3
    assert losses[True][2] < losses[True][0]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
