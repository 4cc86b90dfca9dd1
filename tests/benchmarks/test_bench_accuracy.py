"""The baselines: networks, sentences, and runs that write the same figures as an evaluation."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_segmenter import shared

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _monai() -> None:
    pytest.importorskip("monai")


@pytest.mark.parametrize(
    "arguments",
    [
        ("text_prior", "--size", "32"),
        ("baseline", "--size", "32", "--minutes", "0.02", "--width", "2", "--optimizer", "muon", "--test"),
    ],
)
def test_baseline_scores_a_data_set(arguments: tuple[str, ...], tmp_path: Path) -> None:
    records, _, run = shared()
    script, *rest = arguments
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", f"benchmarks.accuracy.{script}", str(run.parent / "data.csv"), *rest]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--out", str(out)], env=environment, timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["test"]["cases"] == sum(r.split == "test" for r in records)
    assert 0 <= result["test"]["per_image"]["dice"]["value"] <= 1
    assert 0 <= result["test"]["pooled"]["dice"]["value"] <= 1
    if script == "text_prior":
        # Left and right squares are where they were in training: the caption alone finds most of them.
        assert result["test"]["per_image"]["dice"]["value"] > 0.5
    else:
        assert result["curve"][-1]["minutes"] >= 0.02
        assert result["baseline"] == "text-unet" and result["options"]["optimizer"] == "muon"
        assert 0.3 <= result["threshold"] <= 0.7


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["unet", "text-unet", "word-attention", "dynunet"])
def test_networks(name: str, channels: int) -> None:
    """Logits of every pixel, every weight in use, and the sentence read where there is one."""
    from benchmarks.accuracy.baseline import NETWORKS, make_network
    from benchmarks.accuracy.networks import Sentences

    assert name in NETWORKS
    sentences = Sentences(["left lung", "right lung of the patient"], 1)
    network = make_network(argparse.Namespace(network=name, size=32, channels=channels, width=2), len(sentences))
    code = {"text-unet": sentences.multi_hot, "word-attention": sentences.ids}.get(name, lambda texts: None)
    image = torch.randn(2, channels, 32, 32)
    logits = network.train()(image, code(["left lung", "right"]))
    assert logits.shape == (2, 1, 32, 32)
    logits.square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())
    network.eval()
    with torch.no_grad():
        one, other = (network(image, code([text] * 2)) for text in ("left lung", "right lung"))
    assert torch.equal(one, other) == (name in ("unet", "dynunet"))


def test_a_sentence_does_not_depend_on_its_batch() -> None:
    """Shorter sentences are padded; one without a known word attends to the padding alone."""
    from benchmarks.accuracy.networks import Sentences, WordAttentionUNet

    sentences = Sentences(["left lung", "right lung of the patient"], 1)
    network = WordAttentionUNet(32, 1, len(sentences), 2).eval()
    image, texts = torch.randn(3, 1, 32, 32), ["left lung", "right lung of the patient", "heart"]
    with torch.no_grad():
        together = network(image, sentences.ids(texts))
        for row, text in enumerate(texts):
            torch.testing.assert_close(network(image[row : row + 1], sentences.ids([text]))[0], together[row])


def test_the_average_has_the_statistics_of_its_weights() -> None:
    """Batch normalisation's, in float64 by hand; what training goes on with is as before."""
    from benchmarks.accuracy.baseline import NetworkAverage

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2)).train()
    average = NetworkAverage(network, 0.9)
    expected = network[1].running_mean.double()
    for step in range(1, 13):
        network(torch.randn(4, 1, 5, 5) + step)
        average.update(network)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * network[1].running_mean.double()
    last = {name: value.clone() for name, value in network.state_dict().items()}
    with average.applied(network):
        torch.testing.assert_close(network[1].running_mean.double(), expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(network[1].running_var, last["1.running_var"])
    assert all(torch.equal(value, last[name]) for name, value in network.state_dict().items())
    average.copy_to(network)
    torch.testing.assert_close(network[1].running_mean.double(), expected, rtol=1e-5, atol=1e-6)


def test_sentences() -> None:
    from benchmarks.accuracy.networks import Sentences, words

    assert words("The left, lung.", 2) == ["the", "left", "lung", "the left", "left lung"]
    sentences = Sentences(["a b", "b c"], 2)
    assert list(sentences.names) == ["a", "b", "a b", "c", "b c"] and len(sentences) == 5
    assert sentences.multi_hot(["b, C!", "x"]).tolist() == [[0, 1, 0, 1, 1], [0, 0, 0, 0, 0]]
    assert sentences.ids(["a x c", ""]).tolist() == [[0, 5, 3], [5, 5, 5]]


def test_the_mirror_of_a_baseline_is_the_mean_of_two_readings() -> None:
    """The mirror image is read with the sides exchanged in the sentence, and turned back."""
    from benchmarks.accuracy.baseline import Trainer

    trainer = Trainer.__new__(Trainer)
    read: list[str] = []

    def predict(images: np.ndarray, texts: list[str]) -> np.ndarray:
        read.extend(texts)
        return images[:, 0] * (1 if texts[0].startswith("left") else 3)

    trainer.predict = predict  # type: ignore[method-assign]
    image = np.arange(8, dtype=np.float32).reshape(1, 1, 2, 4)
    np.testing.assert_array_equal(trainer.predict_both(image, ["left lung"]), 2 * image[:, 0])
    assert sorted(read) == ["left lung", "right lung"]
