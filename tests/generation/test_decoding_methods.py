"""refine, expected and sample against loops over plain forwards; sample against exact marginals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_decoders import feature_format, full_hidden, make_feature_model, make_images, make_prompts, mask_logits
from torch import Tensor

from ntpseg.generation import DecodingOptions, generate_masks
from ntpseg.generation.decoder import PromptBatch, TargetTemplate
from ntpseg.generation.greedy import greedy
from ntpseg.generation.options import NonFiniteOutput
from ntpseg.generation.sampling import sample, tempered
from ntpseg.losses.dense import from_patches
from ntpseg.models.heads import NextKHeads
from ntpseg.models.readout import PatchReadout
from ntpseg.tokenizers.sequence import SequenceFormat
from ntpseg.tokenizers.vocabulary import Vocabulary

CELLS = 16


class Setup:
    def __init__(self, **options: Any) -> None:
        self.sequence = feature_format("both")
        self.model = make_feature_model(self.sequence, front_end="both", prefix_lm=True, **options)
        self.prompts, self.images = make_prompts(self.sequence, 3), make_images(3)
        self.low = self.sequence.vocabulary.mask_range[0]
        self.book = self.model.readout.patches

    def decode(self, **fields: Any) -> Any:
        settings = DecodingOptions(dtype="float32", **fields)
        return generate_masks(
            self.model, self.prompts, sequence=self.sequence, options=settings, pixel_values=self.images
        )

    def logits(self, row: int, tokens: Any) -> Tensor:
        """[len(tokens) + 1, V], by one plain forward."""
        return mask_logits(
            self.model, full_hidden(self.model, self.sequence, self.prompts[row], tokens, self.images[row])
        )

    def nearest(self, patches: Tensor) -> Tensor:
        return (patches[:, None] - self.book[None]).square().sum(-1).argmin(1)

    def check(self, result: Any, row: int, codes: Tensor, patches: Tensor, logprob: Tensor) -> None:
        np.testing.assert_array_equal(result.codes[row].ravel(), codes)
        np.testing.assert_allclose(result.probability[row], from_patches(patches[None], (4, 4))[0], atol=2e-5)
        np.testing.assert_allclose(result.logprob[row], logprob, atol=5e-5)


@pytest.mark.parametrize("decoder", ["native", "huggingface"])
@pytest.mark.parametrize("passes", [0, 1, 2])
def test_refine_equals_a_loop_over_forwards(passes: int, decoder: Any) -> None:
    setup = Setup()
    result = setup.decode(method="refine", passes=passes, decoder=decoder, batch_size=2)
    assert result.steps == passes + 1
    for row in range(3):
        tokens = torch.full((CELLS,), setup.sequence.vocabulary.pad)
        for _ in range(passes + 1):
            logits = setup.logits(row, tokens[:-1])
            patches = logits.softmax(-1) @ setup.book
            codes = setup.nearest(patches)
            tokens = codes + setup.low
        setup.check(result, row, codes, patches, logits.log_softmax(-1)[torch.arange(CELLS), codes])


def test_each_pass_reads_the_last_draft() -> None:
    """Not the blanks again: otherwise the test above would compare three equal results."""
    setup = Setup()
    drafts = [setup.decode(method="refine", passes=passes).probability for passes in (0, 1, 2)]
    assert np.abs(drafts[0] - drafts[1]).max() > 1e-3 < np.abs(drafts[1] - drafts[2]).max()


def test_expected_equals_a_loop_over_forwards() -> None:
    setup = Setup()
    result = setup.decode(method="expected")
    for row in range(3):
        tokens: list[int] = []
        patches, scores = [], []
        for _ in range(CELLS):
            logits = setup.logits(row, tokens)[-1]
            patches.append(logits.softmax(-1) @ setup.book)
            code = int(setup.nearest(patches[-1][None]))
            scores.append(float(logits.log_softmax(-1)[code]))
            tokens.append(code + setup.low)
        codes = torch.tensor(tokens) - setup.low
        setup.check(result, row, codes, torch.stack(patches), torch.tensor(scores))
    assert (result.codes != setup.decode(method="greedy").codes).any()


def keep_nucleus(probability: Tensor, top_p: float) -> Tensor:
    """The renormalised smallest set of likeliest codes that reaches `top_p`, code by code."""
    kept, total = torch.zeros_like(probability), 0.0
    for code in sorted(range(len(probability)), key=lambda code: -float(probability[code])):
        if total >= top_p:
            break
        kept[code] = probability[code]
        total += float(probability[code])
    return kept / kept.sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.5, 1.0), (0.8, 0.6)])
def test_sample_is_the_mean_of_its_samples(temperature: float, top_p: float) -> None:
    """Each sample of each prompt alone, in a loop over plain forwards."""
    setup = Setup()
    result = setup.decode(method="sample", samples=3, temperature=temperature, top_p=top_p, seed=5)
    for row in range(2):
        patches, scores, drawn = torch.zeros(CELLS, 16), torch.zeros(CELLS), []
        for number in range(3):
            stream, tokens = np.random.default_rng([5, number]), []
            for cell in range(CELLS):
                logits = setup.logits(row, tokens)[-1]
                allowed = keep_nucleus((logits / temperature).softmax(-1), top_p)
                patches[cell] += allowed @ setup.book / 3
                code = int((allowed.log().numpy() + stream.gumbel(size=len(allowed))).argmax())
                scores[cell] += logits.log_softmax(-1)[code] / 3
                tokens.append(code + setup.low)
            drawn.append(np.asarray(tokens) - setup.low)
        np.testing.assert_array_equal(result.samples[row].reshape(3, -1), drawn)
        setup.check(result, row, setup.nearest(patches), patches, scores)
    assert result.steps == CELLS - 1
    assert len({codes.tobytes() for codes in result.samples.reshape(-1, CELLS)}) > 3


@pytest.mark.parametrize("decoder", ["native", "huggingface"])
def test_the_prompts_of_samples_are_read_once(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ntpseg.generation.huggingface import HuggingFaceDecoder
    from ntpseg.generation.native import NativeDecoder

    kind = {"native": NativeDecoder, "huggingface": HuggingFaceDecoder}[decoder]
    read, start = [], kind.start
    monkeypatch.setattr(kind, "start", lambda self, prompts, n: read.append(len(prompts)) or start(self, prompts, n))
    Setup().decode(method="sample", samples=5, decoder=decoder)
    assert read == [3]


@pytest.mark.parametrize("decoder", ["native", "huggingface"])
def test_a_sample_depends_on_its_seed_and_number_alone(decoder: Any) -> None:
    setup = Setup()
    fields = {"method": "sample", "seed": 3, "decoder": decoder}
    whole = setup.decode(samples=5, batch_size=64, **fields)
    for batch_size in (1, 4, 6):
        parts = setup.decode(samples=5, batch_size=batch_size, **fields)
        np.testing.assert_array_equal(parts.samples, whole.samples)
        np.testing.assert_allclose(parts.probability, whole.probability, atol=2e-6)
    fewer = setup.decode(samples=2, **fields)
    np.testing.assert_array_equal(fewer.samples, whole.samples[:, :2])
    setup.prompts, setup.images = setup.prompts[1:2], setup.images[1:2]
    alone = setup.decode(samples=5, **fields)
    np.testing.assert_array_equal(alone.samples, whole.samples[1:2])
    np.testing.assert_allclose(alone.probability, whole.probability[1:2], atol=2e-6)
    other = setup.decode(samples=5, **{**fields, "seed": 4})
    assert (other.samples != alone.samples).any() and (other.probability != alone.probability).any()


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]).log()
    kept = [torch.isfinite(tempered(logits, 1.0, top_p)).tolist() for top_p in (0.45, 0.6, 0.85)]
    assert [rows[0] for rows in kept] == [
        [False, True, False, False],
        [False, True, False, True],
        [False, True, True, True],
    ]
    assert [sum(rows[1]) for rows in kept] == [2, 3, 4] and all(sum(rows[2]) == 1 for rows in kept)
    assert torch.equal(tempered(logits, 1.0, 1.0), logits)
    np.testing.assert_allclose(
        tempered(logits, 2.0, 1.0)[0].softmax(-1), logits[0].exp().sqrt() / logits[0].exp().sqrt().sum()
    )


def test_samples_have_the_models_frequencies() -> None:
    """Gumbel noise draws from the softmax itself: the first cell's codes, over 600 samples."""
    setup = Setup()
    setup.prompts, setup.images = setup.prompts[:1], setup.images[:1]
    first = setup.decode(method="sample", samples=600, batch_size=600, seed=2).samples[0, :, 0, 0]
    expected = setup.logits(0, [])[-1].softmax(-1).numpy()
    found = np.bincount(first, minlength=len(expected)) / len(first)
    # Four standard errors of each frequency.
    assert (np.abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / len(first)) + 1e-9).all()


def test_without_a_readout_the_likeliest_sample_stands_for_all() -> None:
    setup = Setup()
    setup.model.readout = None
    result = setup.decode(method="sample", samples=4)
    assert setup.model.readout is None and result.probability is None and result.samples.shape == (3, 4, 4, 4)
    for row in range(3):
        scores = []
        for codes in result.samples[row]:
            tokens = codes.ravel() + setup.low
            logits = setup.logits(row, tokens[:-1]).log_softmax(-1)
            scores.append(float(logits[torch.arange(CELLS), torch.from_numpy(codes.ravel())].sum()))
        np.testing.assert_array_equal(result.codes[row], result.samples[row][int(np.argmax(scores))])
        np.testing.assert_allclose(result.logprob[row].sum(), max(scores), atol=1e-3)


class Chain:
    """A decoder whose cells are a Markov chain on two codes: its hidden states are the logits themselves."""

    dtype = torch.float32
    start_at = torch.tensor([0.6, 0.4])
    move = torch.tensor([[0.95, 0.05], [0.2, 0.8]])

    def __init__(self, low: int) -> None:
        self.low = low

    def start(self, prompts: PromptBatch, capacity: int) -> Tensor:
        return self.start_at.log().expand(len(prompts), -1)

    def extend(self, tokens: Tensor, grid_ids: Tensor) -> Tensor:
        return self.move[tokens - self.low].log()

    def repeat(self, times: int) -> None:
        """Nothing is remembered."""


def test_sample_approaches_the_marginals_that_greedy_misses() -> None:
    """The likeliest first code is 0, and from 0 the chain hardly leaves: one greedy mask is empty."""
    sequence = SequenceFormat(Vocabulary(1, 0, 2), None, (2, 3))
    low, high = sequence.vocabulary.mask_range
    heads, readout = NextKHeads(2, sequence.vocabulary.size), PatchReadout(2, 1)
    readout.set_patches(torch.tensor([0.0, 1.0])[:, None, None])
    with torch.no_grad():
        heads.weight.zero_()
        heads.weight[low:high] = torch.eye(2)
    prompts = PromptBatch([torch.zeros(2, dtype=torch.long)] * 3, [torch.zeros(2, dtype=torch.long)] * 3)
    target = TargetTemplate(sequence, torch.device("cpu"), readout)
    with torch.no_grad():
        options = DecodingOptions(method="sample", samples=4096, batch_size=3 * 4096)
        decoded = sample(heads, Chain(low), target, prompts, options)
    state, marginals = Chain.start_at, []
    for _ in range(6):
        marginals.append(float(state[1]))
        state = state @ Chain.move
    assert decoded.patches is not None
    # The mean over 4,096 samples of each step's expectation: a standard error below 0.008.
    np.testing.assert_allclose(decoded.patches.mean(0)[:, 0], marginals, atol=0.03)
    with torch.no_grad():
        assert (greedy(heads, Chain(low), target, prompts, DecodingOptions()).codes == 0).all()


def test_probabilities_are_within_bounds() -> None:
    setup = Setup()
    for method in ("expected", "refine", "sample"):
        result = setup.decode(method=method)
        assert result.probability.shape == (3, 16, 16) and result.probability.dtype == np.float32
        assert result.probability.min() >= 0 and result.probability.max() <= 1
        assert ((result.confidence > 0) & (result.confidence <= 1)).all()


@pytest.mark.parametrize("method", ["greedy", "expected", "refine", "sample"])
def test_output_that_is_not_finite_is_refused(method: str) -> None:
    setup = Setup()
    with torch.no_grad():
        setup.model.heads.weight[setup.low] = torch.nan
    with pytest.raises(NonFiniteOutput, match=r"the model's output must be finite, got nan or inf for 3 of 3 masks"):
        setup.decode(method=method)
