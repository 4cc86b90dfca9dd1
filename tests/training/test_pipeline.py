"""``ntpseg train`` from a folder of images to a bundle that loads and predicts alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy import SMALL
from typer.testing import CliRunner

from ntpseg.cli import app
from ntpseg.data import DataProblems
from ntpseg.evaluation.run_directory import training_log
from ntpseg.models import Bundle
from ntpseg.models.sharded_init import WeightShards
from ntpseg.training import load_config, throughput, train
from ntpseg.training.checkpoint import last_checkpoint
from ntpseg.training.pipeline import make_model, make_trainer
from ntpseg.training.preparation import prepare_run

SIDE = 32
FAST = [
    f"data.size={SIDE}",
    "data.variants=1",
    "vision.factor=8",
    "vision.image_codes=16",
    "vision.mask_codes=8",
    "vision.width=8",
    "vision.steps=3",
    "vision.codebook_steps=2",
    "text.vocab_size=300",
    "training.per_device_train_batch_size=4",
    "training.num_train_epochs=2",
    "training.logging_steps=1",
    "training.bf16=false",
    *(f"model.overrides.{key}={value}" for key, value in SMALL.items()),
]


def write_data(folder: Path, train_pairs: int = 8, val_pairs: int = 2) -> Path:
    """Discs on a dark ground with a manifest."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE]
    folder.mkdir()
    lines = ["image,mask,text,split"]
    for n in range(train_pairs + val_pairs):
        cy, cx, r = *rng.integers(8, 24, 2), rng.integers(4, 8)
        disc = (y - cy) ** 2 + (x - cx) ** 2 <= r * r
        Image.fromarray((40 + 160 * disc + rng.integers(0, 20, disc.shape)).astype(np.uint8)).save(folder / f"i{n}.png")
        Image.fromarray((255 * disc).astype(np.uint8)).save(folder / f"m{n}.png")
        side = "left" if cx < SIDE // 2 else "right"
        lines.append(f"i{n}.png,m{n}.png,A disc on the {side}.,{'train' if n < train_pairs else 'val'}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "discs")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "a"
    result = CliRunner().invoke(app, ["train", "tiny", f"data.path={data}", f"output={output}", *FAST])
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert str(output / "model") in result.output
    return output


def test_run_directory(run) -> None:
    for name in ("config.yaml", "trainer_log.jsonl", "prepared.json", "model/model.safetensors", "model/sequence.json"):
        assert (run / name).is_file(), name
    assert {p.name for p in (run / "model").iterdir()} >= {"config.json", "text", "vision"}
    assert not (run / "model" / "training_args.bin").exists()
    assert [p for p in (run / "logs").iterdir() if "tfevents" in p.name]
    assert last_checkpoint(run) == run / "checkpoint-4"
    lines = training_log(run)
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4]
    assert {"ntp", "nktp", "tcl", "het", "token_accuracy", "learning_rate"} <= set(training[0])
    assert all({*throughput._SHOWN} - {"het_sent_mb"} <= set(line) and line["mfu"] > 0 for line in training)
    evaluated = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [2, 4]
    assert all(0.0 <= line["eval_token_dice"] <= 1.0 for line in evaluated)


def test_gradient_filter_benchmark(run, monkeypatch) -> None:
    """The loss benchmark on a run: smaller tiles skip no less, and gradients stay."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    from benchmarks import loss, trained

    operands = trained.trained_operands(run, samples=2)
    exact, filtered = (loss.ours(operands, "torch", threshold)() for threshold in (0.0, 1e-6))
    skipped = list(trained.skipped_tiles(operands, 1e-6, ((128, 64), (1, 1))).values())
    assert 0 <= skipped[0] <= skipped[1] < 1
    facts = trained.filter_facts(operands, exact, filtered)
    assert max(facts["relative_error"].values()) < 1e-3


def test_bundle_round_trip(run, data, tmp_path) -> None:
    """The saved bundle gives the logits of the trained model, from the run's or the model's directory."""
    bundle = Bundle.from_pretrained(run)
    again = Bundle.from_pretrained(bundle.save_pretrained(tmp_path / "copy"))
    assert again.sequence == bundle.sequence == Bundle.from_pretrained(run / "model").sequence
    assert again.vision.fingerprint() == bundle.vision.fingerprint()
    assert again.text.get_vocab() == bundle.text.get_vocab()
    config = load_config(run)
    prepared = prepare_run(config, run, progress=False)
    ids, _ = prepared.sequence.build(
        prepared.training.text_ids(0), prepared.training.image_codes[0, 0], prepared.training.mask_codes[0, 0]
    )
    ids = torch.tensor(ids)[None]
    grid = torch.tensor(prepared.sequence.grid_ids(ids.numpy()))
    with torch.no_grad():
        one, two = (b.model.next_token_logits(b.model(ids, grid_ids=grid).last_hidden_state) for b in (bundle, again))
    assert torch.equal(one, two)
    assert one.std() > 0
    with pytest.raises(ValueError, match="holds no trained model"):
        Bundle.from_pretrained(tmp_path)


def test_existing_run(run, data, tmp_path) -> None:
    settings = ["train", "tiny", f"data.path={data}", *FAST]

    def refused(*more: str) -> str:
        result = CliRunner().invoke(app, [*settings, *more])
        assert isinstance(result.exception, ValueError)
        return str(result.exception)

    assert "give --resume to go on or --overwrite" in refused(f"output={run}")
    assert "holds no run" in refused(f"output={tmp_path / 'new'}", "--resume")
    assert "model.k" in refused(f"output={run}", "model.k=1", "--resume")
    (tmp_path / "mine.txt").write_text("keep")
    assert "is not a run" in refused(f"output={tmp_path}", "--overwrite")
    assert (tmp_path / "mine.txt").is_file()


def test_resume_of_a_finished_run_with_more_epochs(data, tmp_path) -> None:
    config = load_config(
        "tiny", [f"data.path={data}", f"output={tmp_path / 'r'}", *FAST, "training.num_train_epochs=1"]
    )
    run = train(config, progress=False)
    config.training["num_train_epochs"] = 2
    train(config, resume=True, progress=False)
    assert [line["step"] for line in training_log(run) if "loss" in line] == [1, 2, 3, 4]
    train(config, overwrite=True, progress=False)
    assert [line["step"] for line in training_log(run) if "loss" in line] == [1, 2, 3, 4]


def test_vision_tokenizer_and_weights_from_a_path(run, data, tmp_path) -> None:
    config = load_config("tiny", [f"data.path={data}", f"output={tmp_path / 'r'}", *FAST])
    config.vision = {"path": str(run / "model" / "vision")}
    config.text.path = str(run / "model" / "text")
    config.model.weights = str(run / "model")
    prepared = prepare_run(config, tmp_path / "r", progress=False)
    trained = Bundle.from_pretrained(run)
    assert prepared.vision.fingerprint() == trained.vision.fingerprint()
    model = make_model(config, prepared)
    for (name, one), two in zip(model.named_parameters(), trained.model.parameters()):
        assert torch.equal(one, two), name
    config.data.channels = 3
    with pytest.raises(ValueError, match=r"data\.channels must be 1 .* got 3"):
        prepare_run(config, tmp_path / "other", progress=False)


@pytest.mark.parametrize("saved", [False, True], ids=["drawn", "saved"])
def test_model_in_shards_is_that_of_one_process(run, monkeypatch, saved: bool) -> None:
    """As ZeRO-3 and FSDP2 have it built, the codebooks' rows and the mask patches included."""
    config = load_config(run)
    config.model.weights = str(run / "model") if saved else None
    prepared = prepare_run(config, run, progress=False)
    torch.manual_seed(0)
    whole = make_model(config, prepared)
    parts = []
    for rank in range(2):
        shards = WeightShards(rank, 2, flat=False)
        monkeypatch.setattr("ntpseg.training.builders.shards_of_run", lambda args, shards=shards: shards)
        torch.manual_seed(0)
        model = make_model(config, prepared)
        assert torch.equal(model.readout.patches, whole.readout.patches)
        parts.append([shards.of[weight] for weight in model.parameters()])
    for (name, one), *two in zip(whole.named_parameters(), *parts, strict=True):
        assert torch.equal(torch.cat(two), one), name


def test_bad_data_is_refused_with_a_table(tmp_path) -> None:
    folder = write_data(tmp_path / "bad", 6, 0)
    (folder / "m1.png").unlink()
    (folder / "i2.png").write_bytes(b"no image")
    config = load_config("tiny", [f"data.path={folder}", f"output={tmp_path / 'r'}", *FAST, "training.max_steps=1"])
    with pytest.raises(DataProblems) as refused:
        train(config, progress=False)
    assert "missing mask" in str(refused.value) and "unreadable file" in str(refused.value)
    config.data.skip_bad = True
    run = train(config, progress=False)
    left = [json.loads(line)["kind"] for line in (run / "left_out.jsonl").read_text().splitlines()]
    assert sorted(left) == ["missing mask", "unreadable file"]
    assert json.loads((run / "prepared.json").read_text())["pairs"] == {"training": 4, "validation": 0}
    best = ["training.load_best_model_at_end=true", "training.eval_strategy=epoch", "training.save_strategy=epoch"]
    with pytest.raises(ValueError, match="load_best_model_at_end must be false without a validation split, got true"):
        train(load_config(run, [*best, f"output={tmp_path / 'best'}"]), progress=False)
    assert (run / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["flash", "xformers", "flex", "flash_attention_2", "flash_attention_3", "nonsense"])
def test_attention_that_cannot_be_used(run, data, tmp_path, name) -> None:
    if name != "nonsense" and torch.cuda.is_available():
        pytest.skip("may be installed here")
    config = load_config(run, [f"model.attention={name}"])
    with pytest.raises(ValueError, match=f"attention must be .* got '{name}'"):
        make_model(config, prepare_run(config, run, progress=False))
    if name != "flex":  # it has a forward
        with pytest.raises(ValueError, match=f"attention must be .* got '{name}'"):
            Bundle.from_pretrained(run, attention=name)
    new = load_config("tiny", [f"data.path={data}", f"output={tmp_path / 'r'}", *FAST, f"model.attention={name}"])
    with pytest.raises(ValueError, match=f"attention must be .* got '{name}'"):
        train(new, progress=False)
    assert not (tmp_path / "r" / "cache").exists(), "it ends before anything is prepared"


def test_auto_is_measured_once_and_kept(run, data, tmp_path, monkeypatch, capsys) -> None:
    """Also packed, with a checkpointed decoder; a resumed run keeps its choice, whatever the cache says by then."""
    monkeypatch.setenv("NTPSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NTPSEG_MEASURE_ATTENTION", "1")
    monkeypatch.setattr("ntpseg.training.dataset._WORTH_PACKING", 10.0)
    options = ["model.attention=auto", "data.packing=200", "training.activation_checkpointing=true"]
    config = load_config(
        "tiny", [f"data.path={data}", f"output={tmp_path / 'r'}", *FAST, *options, "training.num_train_epochs=1"]
    )
    output = train(config, progress=False)
    kept = json.loads((output / "attention.json").read_text())
    assert kept["asked"] == "auto" and kept["source"] == "measured"
    assert kept["milliseconds"][kept["attention"]] <= 1.03 * min(kept["milliseconds"].values())
    assert set(kept["milliseconds"]) >= {"sdpa", "eager", "causal_blocks"}
    assert f"attention: {kept['attention']} (measured: " in capsys.readouterr().err
    other = "eager" if kept["attention"] != "eager" else "sdpa"
    (output / "attention.json").write_text(json.dumps({**kept, "attention": other, "implementation": other}))
    config.training["num_train_epochs"] = 2
    train(config, resume=True, progress=False)
    assert json.loads((output / "attention.json").read_text())["attention"] == other
    assert f"attention: {other} (kept)" in capsys.readouterr().err
    assert json.loads((run / "attention.json").read_text())["source"] == "default"


def test_strategies_off_by_configuration(run, tmp_path) -> None:
    from ntpseg.training.arguments import training_arguments

    config = load_config(run, ["model.k=1", "loss.negatives=0", "loss.hard_tokens=0"])
    trainer = make_trainer(
        config, prepare_run(config, run, progress=False), training_arguments(config, tmp_path), tmp_path, progress=False
    )
    assert trainer.memory is None
    assert (trainer.model.config.num_heads_k, trainer.model.config.negatives, trainer.model.config.het_weight) == (
        1,
        0,
        0,
    )


def test_eager_and_sdpa_agree(run) -> None:
    one, two = (Bundle.from_pretrained(run, attention=name).model for name in ("eager", "sdpa"))
    assert (one.backbone.config._attn_implementation, two.backbone.config._attn_implementation) == ("eager", "sdpa")
    ids = torch.randint(0, one.config.vocab_size, (2, 30))
    with torch.no_grad():
        states = [m(ids, grid_ids=torch.zeros_like(ids)).last_hidden_state for m in (one, two)]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-4)
