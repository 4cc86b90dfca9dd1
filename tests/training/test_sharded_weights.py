"""Models that two gloo ranks build, load, train and average in shards: one process's numbers, half its memory."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked_ranks import run
from toy import PATCH, SIDE, SMALL, make_toy, make_trainer, sequence_of

from ntpseg.models import NTPSegModel, preset_config
from ntpseg.models.bundle import load_whole
from ntpseg.models.sharded_init import WeightShards, build_sharded, load_sharded
from ntpseg.training import load_config

OPTIONAL = ("heads.", "grid.", "front_end.", "readout.")
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def configuration(**options):
    options = {"grid_positions": True, "patch_size": PATCH, "image_size": SIDE, "channels": 1, **options}
    preset = options.pop("preset", "tiny")
    return preset_config(preset, sequence_of(make_toy(4)), overrides=SMALL, num_heads_k=3, **options)


def assembled(models: list, shards: list[WeightShards]) -> dict[str, torch.Tensor]:
    """The whole weights of what each of two ranks has built."""
    assert all(weight.is_meta for model in models for weight in model.parameters())
    return {
        name: torch.cat([part.of[dict(model.named_parameters())[name]] for model, part in zip(models, shards)])
        for name, _ in models[0].named_parameters()
    }


@pytest.mark.parametrize("flat", [False, True], ids=["rows", "flat"])
@pytest.mark.parametrize(
    "options",
    [{"preset": "emu3-8b"}, {"front_end": "features", "stem": {}}, {"tie_word_embeddings": True}],
    ids=["codes", "features", "tied"],
)
def test_shards_are_those_of_one_process(options, flat: bool, tmp_path) -> None:
    """Drawn and read, bit for bit, whatever is missing in the files drawn as `from_pretrained` draws it."""
    config = configuration(**options)

    def both(build):
        models, shards, states = [], [], []
        for rank in range(2):
            torch.manual_seed(3)
            shards.append(WeightShards(rank, 2, flat=flat))
            models.append(build(lambda: NTPSegModel(config), shards[-1]))
            states.append(torch.get_rng_state())
        return assembled(models, shards), models, states

    def check(expected, got, models, states):
        assert all(torch.equal(state, torch.get_rng_state()) for state in states)
        for name, weight in expected.named_parameters():
            assert torch.equal(got[name].view_as(weight), weight), name
        for model in models:
            for (name, one), two in zip(expected.named_buffers(), model.buffers(), strict=True):
                assert torch.equal(one, two), name

    torch.manual_seed(3)
    expected = NTPSegModel(config)
    check(expected, *both(build_sharded))
    for saved in (expected, expected.backbone):
        folder = tmp_path / type(saved).__name__
        saved.save_pretrained(folder, max_shard_size="200KB")
        assert (folder / "model.safetensors.index.json").is_file()
        torch.manual_seed(3)
        loaded = load_whole(NTPSegModel, folder, optional=OPTIONAL, config=config)
        state = torch.get_rng_state()
        result = both(lambda make, part, folder=folder: load_sharded(make, part, folder, optional=OPTIONAL))
        torch.set_rng_state(state)
        check(loaded, *result)


def test_what_is_read_is_not_drawn_first(tmp_path, monkeypatch) -> None:
    config = configuration()
    saved = NTPSegModel(config)
    saved.save_pretrained(tmp_path)

    def drawn(tensor, *args, **kwargs):
        raise AssertionError(f"{list(tensor.shape)} was drawn")

    for name in ("normal_", "uniform_"):
        monkeypatch.setattr(torch.Tensor, name, drawn)
    shards = WeightShards(0, 1, flat=True)
    model = load_sharded(lambda: NTPSegModel(config), shards, tmp_path)
    for name, weight in model.named_parameters():
        assert torch.equal(shards.of[weight].view(weight.shape), saved.get_parameter(name)), name


def test_codebook_rows_reach_the_shards() -> None:
    config = configuration()
    codes = config.mask_range[1] - config.mask_range[0], config.image_range[1] - config.image_range[0]
    books = [torch.randn(count, 5) for count in codes]
    torch.manual_seed(1)
    expected = NTPSegModel(config)
    expected.init_visual_embeddings(books[1], books[0])
    for flat in (False, True):
        parts = []
        for rank in range(3):
            torch.manual_seed(1)
            shards = WeightShards(rank, 3, flat=flat)
            model = build_sharded(lambda: NTPSegModel(config), shards)
            model.init_visual_embeddings(books[1], books[0])
            parts.append(shards.of[model.get_input_embeddings().weight].flatten())
        weight = expected.get_input_embeddings().weight
        assert torch.equal(torch.cat(parts).view_as(weight), weight)


@pytest.mark.parametrize("fault", ["missing", "shape", "superfluous", "damaged", "no files"])
def test_unusable_weights_are_named(fault: str, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    config = configuration()
    NTPSegModel(config).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    name = "backbone.layers.0.mlp.up_proj.weight"
    if fault == "missing":
        del weights[name]
    elif fault == "shape":
        weights[name] = weights[name][:, :-1].contiguous()
    elif fault == "superfluous":
        weights["other"] = torch.zeros(1)
    save_file(weights, path)
    if fault == "damaged":
        path.write_bytes(path.read_bytes()[:100])
    elif fault == "no files":
        path.unlink()
    message = {
        "missing": f"without '{name}'",
        "shape": f"with another '{name}'",
        "superfluous": "with 'other'",
        "damaged": "must hold a whole model",
        "no files": "must hold model.safetensors or model.safetensors.index.json",
    }
    with pytest.raises(ValueError, match=message[fault]):
        load_sharded(lambda: NTPSegModel(config), WeightShards(0, 2, flat=True), tmp_path, optional=OPTIONAL)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.packing=400", r"data\.packing must be off with training\.sequence_parallel_size above 1"),
        ("model.prefix_lm=true", r"model\.prefix_lm must be off with training\.sequence_parallel_size above 1"),
        ("model.mask_inputs={}", r"model\.mask_inputs must be off with training\.sequence_parallel_size above 1"),
        ("training.sequence_parallel_size=0", r"training\.sequence_parallel_size must be an integer >= 1"),
    ],
)
def test_what_needs_whole_sequences_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("tiny", ["training.sequence_parallel_size=2", "data.mask_noise=0", setting])


def test_models_that_cannot_share_sequences_say_so(monkeypatch, tmp_path) -> None:
    ranks = SimpleNamespace(size=3)

    def grouped(group, attention):
        ranks.attention = attention
        return ranks

    monkeypatch.setattr("ntpseg.models.model.SequenceGroup", grouped)
    model = NTPSegModel(configuration())
    with pytest.raises(ValueError, match="sequence_parallel_size must divide the 2 attention heads, got 3"):
        model.share_sequences(None)
    ranks.size = 2
    model.backbone.config._attn_implementation = "eager"
    with pytest.raises(ValueError, match=r"attention must be one of sdpa, .* sequence_parallel_size .* got 'eager'"):
        model.share_sequences(None)
    with pytest.raises(ValueError, match="sequence_parallel_size must divide the number of ranks, 1, got 2"):
        make_trainer(make_toy(4), tmp_path, trainer_options={"sequence_parallel_size": 2})


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The losses, evaluations and average of one process, and its checkpoint of step 3."""
    from sharded_ranks import FIELDS, figures

    trainer = make_trainer(
        make_toy(16, variants=1),
        tmp_path_factory.mktemp("single"),
        **{**FIELDS, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    )
    trainer.train()
    averaged = {name: weight.clone() for name, weight in zip(trainer.average.names, trainer.average.weights)}
    return np.array(figures(trainer)), averaged, trainer


ZERO = ("zero3", "zero3+/", "zero3_offload") if DEEPSPEED else ()
FSDP = ("ddp/", "fsdp2", "fsdp2+/", "fsdp2*")
MODES = (*FSDP, *ZERO)
MIXED = "fsdp2~"
SAVED = [mode for mode in MODES if mode in ("fsdp2", "zero3")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Result and folder of the start that a mode belongs to, of FSDP or of DeepSpeed."""
    done = {}

    def of(mode: str):
        stage, modes = ("zero3", ZERO) if mode.startswith("zero") else ("fsdp2", (*FSDP, MIXED))
        if stage not in done:
            output = tmp_path_factory.mktemp(stage)
            # What is freed goes back to the system, so that memory in use is what is measured.
            run("sharded_ranks.py", str(output), f"memory {stage}", *modes, MALLOC_MMAP_THRESHOLD_="65536")
            done[stage] = json.loads((output / "result.json").read_text()), output
        return done[stage]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_ranks_equal_one_process(single, ranks, mode: str) -> None:
    """Built in shards, every loss and norm of training, every evaluation of the average.

    With ``+`` and ``*`` under activation checkpointing, with ``/`` with half of each sequence and the classes on each
    rank.
    """
    from sharded_ranks import NAMES

    expected, _, _ = single
    got = np.array(ranks(mode)[0][mode])
    assert len(expected) == 5 and expected[2:4, NAMES.index("het")].all() and expected.shape == got.shape
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_losses_of_bfloat16_products_are_not_rounded_to_it(single, ranks) -> None:
    expected, got = single[0], np.array(ranks(MIXED)[0][MIXED])
    np.testing.assert_allclose(got[:, 0], expected[:, 0], rtol=0.02)
    losses = torch.tensor(got[:, 0], dtype=torch.float32)
    assert (losses != losses.bfloat16().float()).all(), losses


@pytest.mark.slow
@pytest.mark.parametrize("mode", SAVED)
def test_average_is_sharded_saved_and_resumed(single, ranks, mode: str) -> None:
    """Each rank averages and saves about half; the saved model is the average; a resumed run ends with the same."""
    result, output = ranks(mode)
    _, averaged, trainer = single
    whole = sum(weight.numel() for weight in averaged.values())
    assert sum(result[f"{mode} held"]) == whole and max(result[f"{mode} held"]) < 0.55 * whole
    checkpoint = output / mode / "checkpoint-3"
    sizes = [(checkpoint / f"ema_{rank}.safetensors").stat().st_size for rank in range(2)]
    assert not (checkpoint / "ema.safetensors").exists() and max(sizes) < 0.6 * 4 * whole
    saved = NTPSegModel.from_pretrained(output / mode / "model")
    for name, weight in saved.named_parameters():
        difference = (weight - averaged[name]).abs()
        assert difference.mean() < 1e-5 and torch.quantile(difference.flatten(), 0.99) < 1e-4, name
    np.testing.assert_allclose(result[f"{mode} resumed"], np.array(result[mode])[3:], rtol=1e-5, atol=1e-7)
    # What two ranks saved in parts one process reads whole.
    trainer.average.load(checkpoint)
    assert trainer.average.steps == 3


@pytest.mark.slow
@pytest.mark.parametrize("mode", SAVED)
def test_no_rank_holds_the_whole_model(ranks, mode: str) -> None:
    """Peaks of both ranks while a model is drawn, read, given to DeepSpeed or FSDP2; a whole one shows the measure."""
    result = ranks(mode)[0][f"memory {mode}"]
    for peaks in result["peaks"]:
        limit = 0.5 * result["model"] + 2 * result["largest"] + 10
        assert peaks["drawn"] < limit and peaks["read"] < limit, (peaks, limit)
        assert limit < 0.8 * result["model"] < peaks["whole"], (peaks, result)
