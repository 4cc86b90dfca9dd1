"""``ntpseg plan``: its counts against real models, its choice, and what it says where a run does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_segmenter import write_dataset, write_manifest
from typer.testing import CliRunner

from benchmarks.packing import kept_bytes
from ntpseg.cli import app
from ntpseg.cluster.machines import GPUS, gpu
from ntpseg.cluster.planning.activations import layer_activations
from ntpseg.cluster.planning.memory import Batch, hard_token_bytes, memory_plan
from ntpseg.cluster.planning.numerics import Numerics
from ntpseg.cluster.planning.plan import make_plan
from ntpseg.cluster.planning.search import PlanOptions, choose, fits, remedies
from ntpseg.cluster.planning.states import states
from ntpseg.cluster.sizes import ParameterCounts
from ntpseg.cluster.workload import Workload, sequence_format
from ntpseg.memory import HardTokenMemory
from ntpseg.models import NTPSegModel, preset_config
from ntpseg.training import load_config
from ntpseg.training.arguments import training_arguments
from ntpseg.training.config import CONFIGS

SMALL = ("model.overrides={hidden_size: 64, intermediate_size: 160, num_attention_heads: 4, num_key_value_heads: 2}",)


@cache
def preset(name: str) -> Workload:
    return Workload.of(load_config(name))


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "200"})


def make_model(config: Any, layers: int, **options: Any) -> NTPSegModel:
    made = preset_config(
        config.model.preset,
        sequence_format(config),
        overrides={**config.model.overrides, "num_hidden_layers": layers, "head_dim": 16},
        num_heads_k=config.model.k,
        grid_positions=False,
        **options,
    )
    made._attn_implementation = "causal_blocks"
    return NTPSegModel(made).train()


@pytest.mark.parametrize(("size", "prefix"), [(64, False), (64, True), (192, False)])
def test_activations_of_a_layer_are_those_that_autograd_keeps(size: int, prefix: bool) -> None:
    # 192 pixels make a sequence above the blocks' longest, whose attention keeps no probabilities.
    prefix_lm = f"model.prefix_lm={str(prefix).lower()}"
    config = load_config("tiny", [f"data.size={size}", *SMALL, "model.overrides.head_dim=16", prefix_lm])
    work = Workload.of(config)
    sequence = sequence_format(config)
    grid = torch.zeros(sequence.mask_grid, dtype=torch.int64).numpy()
    ids, labels = (torch.as_tensor(x).repeat(2, 1) for x in sequence.build([1] * 32, grid, grid))
    batch = {"input_ids": ids, "labels": labels}
    if prefix:
        batch["grid_ids"] = torch.as_tensor(sequence.grid_ids(ids.numpy()))
    one, three = (kept_bytes(make_model(config, n, prefix_lm=prefix), batch) for n in (1, 3))
    layer = layer_activations(work, Numerics("one", "float32", "cpu"), samples=2)
    assert ids.shape[1] == work.longest
    assert (three - one) / 2 == pytest.approx(layer.kept + layer.input, rel=0.02)


def test_parameters_are_the_models() -> None:
    config = load_config("tiny", SMALL)
    model = make_model(config, 2)
    counts = ParameterCounts.of(model)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.layers == 2 and counts.layer == sum(p.numel() for p in model.backbone.layers[1].parameters())
    assert preset("emu3-8b").parameters.total == pytest.approx(8.54e9, rel=0.01)


def test_fsdp2_holds_what_its_units_pad_to() -> None:
    """On 8 ranks the k - 1 transforms are gathered as 8, in one buffer and in their place; a tied embedding once."""
    work = preset("emu3-8b")
    (row,) = {p.numel // 3 for p in work.shape.parameters if p.name == "heads.transform_weight"}
    three, eight = (states(work, Numerics("fsdp2"), ranks) for ranks in (3, 8))
    bias = work.sizes.hidden
    assert eight.forward.gathered - three.forward.gathered == 2 * 2 * (8 - 3) * (row + bias)
    tied = replace(work, parameters=replace(work.parameters, head=0))
    saved = 2 * work.parameters.embedding
    assert states(tied, Numerics("fsdp2"), 8).backward_end.gathered == eight.backward_end.gathered - saved


def test_hard_tokens_take_what_their_memory_does() -> None:
    memory = HardTokenMemory(50, 8)
    held = sum(tensor.nbytes for tensor in (memory._store.rows, memory._store.stamp, memory._store.flags))
    assert hard_token_bytes(50, 8) == held


def test_stages_divide_what_the_paper_says() -> None:
    """ZeRO (arXiv 1910.02054), figure 1: 16 bytes a parameter, of which 12, 14 and 16 are divided."""
    work, ranks = preset("emu3-8b"), 64
    total = work.parameters.total
    kept = {name: states(work, Numerics(name), ranks) for name in ("ddp", "zero1", "zero2", "zero3", "fsdp2")}
    assert kept["zero1"].weights == kept["zero2"].weights == 2 * total
    assert kept["zero1"].optimizer == pytest.approx(12 * total / ranks)
    assert kept["zero1"].backward_end.gradients == 2 * total
    assert kept["zero2"].backward_end.gradients == pytest.approx(2 * total / ranks)
    whole = kept["zero3"]
    assert whole.weights + whole.gradients + whole.optimizer == pytest.approx(16 * total / ranks)
    # FSDP2 divides the first dimension: of the k - 1 transforms the fullest rank holds one whole.
    transforms, rows = work.parameters.transforms, work.heads - 1
    fullest = (total - transforms) / ranks + transforms / rows
    assert kept["fsdp2"].weights + kept["fsdp2"].optimizer == pytest.approx(12 * fullest)
    assert kept["ddp"].persistent >= 16 * total - 4 * total


def test_memory_falls_with_each_way_to_save_it() -> None:
    work, batch = preset("emu3-8b"), Batch(1, 16, True)
    total = [memory_plan(work, Numerics(s), 8, batch).total for s in ("ddp", "zero1", "zero2", "zero3")]
    assert total == sorted(total, reverse=True) and len(set(total)) == 4
    offloaded = memory_plan(work, Numerics("zero2", offload="optimizer"), 8, batch)
    assert offloaded.total < total[2] and offloaded.host > 0
    kept = memory_plan(work, Numerics("zero3"), 8, replace(batch, checkpointing=False))
    assert kept.total > total[3]
    assert sum(kept.parts.values()) == kept.total
    longer = layer_activations(work, Numerics("zero3"), 1, 2000).kept
    assert longer == pytest.approx(2 * layer_activations(work, Numerics("zero3"), 1, 1000).kept)


def test_what_is_chosen_fits_and_divides_no_more_than_it_must() -> None:
    eight, card = preset("emu3-8b"), gpu("h100")
    for gpus in (8, 64):
        chosen = choose(eight, card, PlanOptions(gpus=gpus))
        assert fits(chosen, card) and chosen.numerics.zero
        assert chosen.batch.samples * chosen.batch.accumulation == 16
    assert choose(preset("base"), card, PlanOptions()).numerics.sharding == "one"
    assert choose(preset("base"), card, PlanOptions(gpus=8)).numerics.sharding == "ddp"
    # A small micro-batch waits for the host.
    assert choose(preset("tiny"), card, PlanOptions()).batch.samples == 16
    assert choose(eight, card, PlanOptions()).numerics.offload == "optimizer"


@pytest.mark.parametrize(
    ("card", "options", "said"),
    [
        ("a100-40gb", PlanOptions(8, "3", samples=16, offload=False), "a smaller micro-batch: "),
        ("h100", PlanOptions(8, "3", samples=4, checkpointing=False, offload=False), "activation checkpointing: "),
        ("h100", PlanOptions(8, "none", offload=False), "another ZeRO stage: "),
        ("h100", PlanOptions(1, offload=False), "optimizer offload: "),
        ("a100-40gb", PlanOptions(2, "3", offload=False), "8 GPUs: "),
        ("l4", PlanOptions(1, "2", offload=False), "2 GPUs and free choice of the rest: "),
    ],
)
def test_what_does_not_fit_says_what_would(card: str, options: PlanOptions, said: str) -> None:
    work, kind = preset("emu3-8b"), GPUS[card]
    assert not fits(choose(work, kind, options), kind)
    named = remedies(work, kind, options)
    assert any(text.startswith(said) for text in named), named
    for text in named:
        used, usable = text.rsplit(", ", 1)[1].removesuffix(" GiB").split(" of ")
        assert float(used) <= float(usable)


def test_command_prints_and_writes_the_plan(tmp_path: Path) -> None:
    records = write_dataset(tmp_path / "data", 12)
    write_manifest(tmp_path / "data.csv", records)
    training = sum(record.split == "train" for record in records)
    arguments = ["--preset", "tiny", "--gpus", 2, "--gpu", "A100", "--data", tmp_path / "data.csv", "--batch", 4]
    file = tmp_path / "plan.json"
    done = run(*arguments, "--price-per-gpu-hour", 2.0, "--json", file)
    assert done.exit_code == 0, done.output
    assert "fits" in done.output and "predicted" in done.output and "--data for its hours" not in done.output
    preset = tmp_path / "run.yaml"
    preset.write_text("data: {size: 64}\n")
    for target in (preset, tmp_path / "plan.txt"):
        refused = run("--preset", preset, "--json", target)
        assert str(refused.exception).startswith("--json must end in .json, got ")
    named = tmp_path / "run.json"
    named.write_text("{}")
    with_json = run("--preset", named, "--json", named)
    assert str(with_json.exception).startswith("--json must not replace what is read, got ")
    plan = json.loads(file.read_text())
    assert plan["steps_per_epoch"] == -(-training // 4) and plan["sequences"] == 4
    assert plan["cost"] == pytest.approx(plan["hours"] * 2 * 2.0)
    assert plan["hours"] == pytest.approx(20 * plan["steps_per_epoch"] * plan["chosen"]["seconds"] / 3600)
    assert sum(plan["chosen"]["memory"]["parts"].values()) == plan["chosen"]["memory"]["total"]


def test_command_ends_with_1_where_nothing_fits() -> None:
    done = run("--preset", "emu3-8b", "--gpu", "l4", "--zero", "none")
    assert done.exit_code == 1
    assert "does not fit" in done.output and "what would: " in done.output


@pytest.mark.parametrize("zero", ["1", "3", "fsdp2"])
def test_the_settings_carry_the_plan_out(zero: str, tmp_path: Path) -> None:
    plan = make_plan(load_config("tiny"), gpu("l4"), PlanOptions(2, zero, samples=2, checkpointing=True))
    settings = [argument for argument in plan.arguments if "=" in argument]
    config = load_config("tiny", [*settings, "training.bf16=false"])
    args, batch = training_arguments(config, tmp_path), plan.chosen.batch
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, batch.accumulation)
    assert config.training["activation_checkpointing"] is True
    assert plan.arguments[-2:] == ("--deepspeed", f"zero{zero}") or args.fsdp_plugin_args["fsdp_version"] == 2


@pytest.mark.parametrize("zero", ["2", "3"])
@pytest.mark.parametrize("offload", [False, True])
def test_the_deepspeed_file_offloads_where_the_plan_does(zero: str, offload: bool) -> None:
    plan = make_plan(load_config("tiny"), gpu("l4"), PlanOptions(2, zero, offload=offload))
    file = CONFIGS / f"{plan.arguments[plan.arguments.index('--deepspeed') + 1]}.json"
    assert ("offload_optimizer" in json.loads(file.read_text())["zero_optimization"]) is offload
    assert (plan.chosen.numerics.offload == "optimizer") is offload


def test_measured_utilisation_replaces_the_predicted_one(tmp_path: Path) -> None:
    rows = [{"step": n, "mfu": mfu} for n, mfu in enumerate((0.01, 0.2, 0.3, 0.25))]
    (tmp_path / "trainer_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config, kind = load_config("small"), gpu("h100")
    plan = make_plan(config, kind, PlanOptions(), measured=tmp_path)
    assert plan.options.mfu == 0.25 and plan.measured == {"mfu": str(tmp_path)}
    half = make_plan(config, kind, PlanOptions(mfu=0.125))
    assert half.chosen.compute.model == pytest.approx(2 * plan.chosen.compute.model)
    assert half.measured == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpu", "h1000"), "gpu must be one of"),
        (("--zero", "4"), "zero must be"),
        (("--preset", "qata"), "model.front_end must be codes for a plan"),
        (("--preset", "huge"), "configuration must be"),
        (("--batch", "3", "--gpus", "2"), "batch must be a multiple of the GPUs, 2, got 3"),
        (("--offload", "--zero", "1"), "zero must be auto, 2 or 3 with offload"),
        (("--precision", "int8"), "precision must be"),
        (("--measured", "."), "measured must be a run"),
        (("--data", "nowhere"), "nowhere"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    if "--measured" in arguments:
        (tmp_path / "trainer_log.jsonl").write_text("")
        arguments = ("--measured", str(tmp_path))
    error = run(*arguments).exception
    assert isinstance(error, ValueError | OSError), error
    assert words in str(error) and "\n" not in str(error)
