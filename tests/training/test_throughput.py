"""Step time, tokens, FLOP/s, memory and waiting for data in the logs of training."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from toy import losses, make_toy, make_trainer

from benchmarks.models import Size, matrices
from benchmarks.train import step_flops
from ntpseg.models import NTPSegModel, preset_config
from ntpseg.models.flops import TrainingFlops
from ntpseg.tokenizers.sequence import SequenceFormat
from ntpseg.tokenizers.vocabulary import Vocabulary
from ntpseg.training.callbacks import TrainingProgress
from ntpseg.training.throughput import Throughput, count_batch, peak_memory, shown
from ntpseg.utils.flop_rate import matmul_flops

RATES = ("tokens_per_second", "supervised_tokens_per_second", "flops_per_second")
CPU = torch.device("cpu")


def ragged(pairs: int) -> Any:
    """Captions of different lengths, so that batches have padding."""
    toy = make_toy(pairs)
    for row, texts in enumerate(toy.texts):
        toy.texts[row] = [text + "!" * row for text in texts]
    return toy


def work(line: dict[str, Any], steps: int = 1) -> list[float]:
    return [line[name] * line["step_seconds"] * steps for name in RATES]


def lines_of(trainer: Any) -> list[dict[str, Any]]:
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("heads", [1, 3])
def test_the_benchmark_and_the_log_count_the_same_operations(heads: int) -> None:
    """Six per weight and token, six per head weight and row, half of twelve per layer, pair and feature."""
    size = Size("smallest", 4, 24, 64, batch=2, heads=heads, dtype="float32")
    model = size.model(CPU)
    ids, labels = size.batch_of(CPU)
    rows = int((labels[:, 1:] != -100).sum())
    config, text = model.config, model.config.text_config
    weights = sum(weight.numel() for weight in matrices(model))
    attention = text.num_hidden_layers * text.num_attention_heads * text.head_dim * ids.shape[1]
    head = heads * config.vocab_size * config.hidden_size + (heads - 1) * config.hidden_size**2
    expected = 6.0 * ids.numel() * (weights + attention) + 6.0 * rows * head
    assert step_flops(model, ids, rows) == pytest.approx(expected, rel=1e-12)

    counts = count_batch({"input_ids": ids}, config.text_config.pad_token_id, CPU)
    assert counts.tolist() == [ids.numel(), len(ids) * ids.shape[1] ** 2, ids.numel(), len(ids)]
    throughput = Throughput(heads, CPU)
    throughput.prepare(model, torch.float32)
    next(throughput.batches(iter([None])))
    throughput.add(torch.cat([torch.full((heads,), float(rows)).double(), counts]))
    throughput.step()
    figures = throughput.pop()
    seconds = figures["step_seconds"]
    assert figures["flops_per_second"] * seconds == pytest.approx(expected, rel=1e-9)
    assert figures["tokens_per_second"] * seconds == pytest.approx(ids.numel())
    peak = matmul_flops(CPU, torch.float32)
    assert figures["mfu"] == pytest.approx(figures["flops_per_second"] / peak)
    assert throughput.pop() == {}, "no step, no figures"


@pytest.mark.parametrize(("batch", "times"), [(4, 1), (2, 2), (1, 4)])
def test_a_step_counts_its_tokens_however_it_is_accumulated(tmp_path, batch: int, times: int) -> None:
    """Padding is no token; the last batch of an epoch is smaller."""
    trainer = make_trainer(
        ragged(7), tmp_path, k=3, per_device_train_batch_size=batch, gradient_accumulation_steps=times
    )
    sizes = [len(trainer.train_dataset[i]["input_ids"]) for i in range(7)]
    supervised = [(trainer.train_dataset[i]["labels"][1:] != -100).sum() for i in range(7)]
    flops = TrainingFlops.of(trainer.model)
    order = [np.random.default_rng((0, epoch)).permutation(7) for epoch in range(2)]
    trainer.train()
    lines = lines_of(trainer)
    assert len(lines) == 4
    for line, pairs in zip(lines, [part for one in order for part in (one[:4], one[4:])]):
        tokens, rows = sum(sizes[i] for i in pairs), sum(supervised[i] for i in pairs)
        operations = flops.step(tokens=tokens, squares=sum(sizes[i] ** 2 for i in pairs), rows=[rows] * 3)
        assert work(line) == pytest.approx([tokens, rows, operations], rel=1e-6)
        assert 0 <= line["data_wait_share"] < 1 and line["mfu"] > 0 and line["peak_memory_gib"] > 0.05
    assert (lines[0]["padding_share"] > 0) == (batch > 1)


def test_a_line_covers_the_steps_since_the_last(tmp_path) -> None:
    """All steps of the first log; after a resumed run's checkpoint its own alone."""
    fields = {"num_train_epochs": 2, "logging_steps": 3, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(make_toy(8), tmp_path / "run", **fields)
    whole.train()
    tokens = 4 * len(whole.train_dataset[0]["input_ids"])
    assert work(lines_of(whole)[0], 3)[0] == pytest.approx(3 * tokens, rel=0.1)
    again = make_trainer(make_toy(8), tmp_path / "again", **fields)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert work(lines_of(again)[-1], 1)[0] == pytest.approx(tokens, rel=0.1)
    assert losses(again) == losses(whole)


def test_waiting_for_data_is_seen_and_evaluation_is_no_step(tmp_path) -> None:
    """By a clock of its own: a sample takes 1 s, an evaluation and a checkpoint 100 s each."""
    clock = [0.0]

    def spend(seconds: float, call: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            clock[0] += seconds
            return call(*args, **kwargs)

        return timed

    trainer = make_trainer(
        make_toy(8), tmp_path, evaluate=True, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1
    )
    trainer.throughput.now = lambda: clock[0]
    trainer.train_dataset.variant = spend(1.0, trainer.train_dataset.variant)
    trainer.evaluation_loop = spend(100.0, trainer.evaluation_loop)
    trainer._save_optimizer_and_scheduler = spend(100.0, trainer._save_optimizer_and_scheduler)
    trainer.training_step = spend(12.0, trainer.training_step)
    trainer.train()
    lines = lines_of(trainer)
    # The loader fetches one batch ahead: two in an epoch's first step, none in its second.
    assert [line["step_seconds"] for line in lines] == pytest.approx([20, 12, 20, 12])
    assert [line["data_wait_share"] for line in lines] == pytest.approx([0.4, 0, 0.4, 0])


def test_packed_and_filled_up_rows() -> None:
    """A position that starts again is another sequence; a sample that only fills up a batch is nothing."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 0], [5, 6, 7, 0, 0, 0]])
    position = torch.tensor([[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]])
    assert count_batch({"input_ids": ids, "position_ids": position}, 0, CPU).tolist() == [8, 4 + 9 + 9, 12, 3]
    assert count_batch({"input_ids": ids}, 0, CPU).tolist() == [8, 25 + 9, 12, 2]
    assert count_batch({"input_ids": ids, "sample_ids": torch.tensor([3, -1])}, 0, CPU).tolist() == [5, 25, 12, 1]
    packing = {"source": torch.arange(10).view(1, 10)}
    assert count_batch({"input_ids": ids, "packing": packing}, 0, CPU).tolist() == [8, 25 + 9, 10, 2]
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]])
    assert count_batch({"input_ids": ids, "attention_mask": mask}, 0, CPU).tolist() == [7, 36 + 1, 12, 2]


def test_operations_of_an_image_front_end() -> None:
    """Three times those of its forward pass as PyTorch counts them, without a random number drawn."""
    from torch.utils.flop_counter import FlopCounterMode

    sequence = SequenceFormat(Vocabulary(256, 0, 16), None, (4, 4))
    fields = {"front_end": "features", "image_size": 32, "channels": 1, "patch_size": 8, "stem": {"widths": [16, 32]}}
    config = preset_config("tiny", sequence, grid_positions=True, dense_loss={"dice": 1.0}, **fields)
    model = NTPSegModel(config)
    before = torch.get_rng_state()
    image = TrainingFlops.of(model).image
    assert torch.equal(torch.get_rng_state(), before)
    ids = torch.ones(1, 1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model.encode_image(torch.zeros(1, 1, 32, 32), ids)
    logits = 2 * 16 * 16 * config.hidden_size
    assert image == 3 * (counter.get_total_flops() + logits)
    assert counter.get_total_flops() > 2 * 8 * 8 * 9 * 16 * 16, "one convolution of the first level"


def test_the_console_shows_every_figure() -> None:
    logs = {
        "loss": 1.0,
        "step_seconds": 0.25,
        "tokens_per_second": 8123.4,
        "supervised_tokens_per_second": 4000.0,
        "flops_per_second": 3.25e10,
        "mfu": 0.412,
        "peak_memory_gib": 1.25,
        "data_wait_share": 0.031,
        "padding_share": None,
    }
    text = ", ".join(f"{name} {value}" for name, value in shown(logs).items())
    assert text == ("s/step 0.25, tok/s 8123, sup. tok/s 4000, FLOP/s 3.25e+10, MFU 41.2%, GiB 1.25, data wait 3.1%")
    bar = TrainingProgress()
    state: Any = SimpleNamespace(is_world_process_zero=True, max_steps=3, global_step=0)
    bar.on_train_begin(None, state, None)
    bar.on_log(None, state, None, logs=logs)
    assert bar.metrics["MFU"] == "41.2%" and bar.metrics["loss"] == "1"
    bar.training_bar.close()


def test_the_rate_is_measured_once(monkeypatch) -> None:
    first = matmul_flops(CPU, torch.float32)
    assert first > 1e8
    monkeypatch.setattr(torch, "mm", None)
    assert matmul_flops(CPU, torch.float32) == first


def test_peak_memory_never_falls() -> None:
    before = peak_memory(CPU)
    block = torch.ones(2**24)
    after = peak_memory(CPU)
    del block
    assert 0 < before <= after <= peak_memory(CPU)


def test_logs_beside_the_benchmark(tmp_path, capsys) -> None:
    """The same tokens, ratios of one process, and parts of the step."""
    from benchmarks.training_log import main

    file = tmp_path / "result.json"
    assert main(["--preset", "smallest", "--steps", "2", "--results", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["tokens"]["log"] == pytest.approx(result["tokens"]["bench"], rel=1e-3)
    assert set(result["ratios"]) == {"log / bench", *(f"{x} / products" for x in ("log", "bench", "bench, sdpa"))}
    assert {"attention", "MLP", "optimiser"} <= {row["part"] for row in result["parts"]["parts"]}
    assert "log / bench: " in capsys.readouterr().out
