"""The choice of the decoding: the best of its own table, ties, what one more pass has to gain."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ntpseg.generation import segmenter as segmenter_module
from ntpseg.generation.options import DecodingOptions
from ntpseg.tokenizers.preprocess import Pair
from ntpseg.training import decoding_choice
from ntpseg.training.decoding_choice import THRESHOLDS, choose_decoding

SIDE, COUNT = 8, 7
REFINE = DecodingOptions(method="refine", mirror=True)
PLAIN = DecodingOptions(method="refine")


class Cache:
    """Masks of `index` + 4 pixels."""

    def __len__(self) -> int:
        return COUNT

    def pair(self, index: int) -> Pair:
        mask = np.zeros(SIDE * SIDE, np.float32)
        mask[: index + 4] = 1
        image = np.full((1, SIDE, SIDE), index, np.float32)
        return Pair(image, mask.reshape(1, SIDE, SIDE), f"text {index}")


def bundle(**inputs: float) -> Any:
    config = SimpleNamespace(mask_inputs={"replaced": 1.0, "draft": 0.7, "blank": 0.3, **inputs})
    return SimpleNamespace(model=SimpleNamespace(config=config), sequence=SimpleNamespace(image_grid=None))


@pytest.fixture
def decode(monkeypatch):
    """Sets what is decoded: function of passes and the true mask [S, S] to probabilities [S, S]."""

    def install(function) -> list[DecodingOptions]:
        seen: list[DecodingOptions] = []

        class Fake:
            def __init__(self, bundle: Any, options: DecodingOptions) -> None:
                self.options = options
                seen.append(options)

            def encode_prepared(self, pixels: np.ndarray) -> Any:
                return SimpleNamespace(pixels=pixels)

            def decode(self, images: Any, texts: list[str], progress: Any) -> list[np.ndarray]:
                progress(len(texts))
                rows = [int(image[0, 0, 0]) for image in images.pixels]
                assert texts == [f"text {row}" for row in rows]
                return [function(self.options.passes, Cache().pair(row).mask[0]) for row in rows]

            def probabilities(self, generated: list[np.ndarray]) -> list[np.ndarray]:
                return generated

        monkeypatch.setattr(segmenter_module, "Segmenter", Fake)
        return seen

    return install


def choose(made: Any = None, default: DecodingOptions = REFINE, **options: Any) -> Any:
    return choose_decoding(made or bundle(), Cache(), default, progress=False, **options)  # type: ignore[arg-type]


def chosen_options(choice: Any) -> dict[str, Any]:
    """Without the temperature, which has tests of its own."""
    return {name: value for name, value in choice.options.items() if name != "calibration_temperature"}


def test_it_is_the_best_of_the_table(decode) -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.25, (3, SIDE, SIDE))

    def noisy(passes: int, mask: np.ndarray) -> np.ndarray:
        return np.clip(0.3 + 0.2 * mask + 0.1 * passes * mask + noise[passes], 0, 1)

    seen = decode(noisy)
    choice = choose()
    assert [options.passes for options in seen] == [0, 1, 2] and all(options.mirror for options in seen)
    assert set(choice.dice) == {(True, passes, t) for passes in (0, 1, 2) for t in THRESHOLDS}
    for (_, passes, threshold), dice in choice.dice.items():
        naive = []
        for index in range(COUNT):
            truth = Cache().pair(index).mask[0] > 0
            mask = noisy(passes, truth * 1.0) >= threshold
            naive.append(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))
        assert dice == pytest.approx(np.mean(naive), abs=1e-9)
    best = max(choice.dice, key=lambda key: choice.dice[key] - 0.001 * (2 * key[1] + 1))
    assert chosen_options(choice) == {"method": "refine", "passes": best[1], "threshold": best[2], "mirror": True}
    assert choice.cases == COUNT
    table = choice.to_dict()
    assert table["options"] == choice.options and len(table["tried"]) == len(choice.dice)


def test_ties_go_to_fewer_passes_and_the_middle_threshold(decode) -> None:
    decode(lambda passes, mask: mask)
    choice = choose()
    assert set(choice.dice.values()) == {1.0}
    assert chosen_options(choice) == {"method": "refine", "passes": 0, "threshold": 0.5, "mirror": True}


@pytest.mark.parametrize(("better", "passes"), [(0, 0), (1, 1)])
def test_a_pass_has_to_be_worth_its_time(decode, monkeypatch, better: int, passes: int) -> None:
    """One more pass mends one pixel of the largest mask: about 0.007 of its Dice, 0.001 of the mean."""

    def mended(used: int, mask: np.ndarray) -> np.ndarray:
        probability = mask.copy()
        if not used and mask.sum() == COUNT + 3:
            probability.flat[0] = 0.0
        return probability

    decode(mended)
    first = choose(default=PLAIN)
    gain = first.dice[False, 1, 0.5] - first.dice[False, 0, 0.5]
    assert 0 < gain < 0.02
    monkeypatch.setattr(decoding_choice, "GAIN_PER_PASS", gain / 2 if better else gain * 2)
    assert choose(default=PLAIN).options["passes"] == passes


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("worth", [False, True])
def test_the_mirror_is_tried_where_training_flips_and_taken_where_it_pays(
    decode, monkeypatch, flips: bool, worth: bool
) -> None:
    """One more pass mends one pixel of one mask, and the mirror another."""
    used: list[DecodingOptions] = []

    def mended(passes: int, mask: np.ndarray) -> np.ndarray:
        probability = mask.copy()
        if mask.sum() == COUNT + 3:
            probability.flat[0] = float(passes > 0)
            probability.flat[1] = float(used[-1].mirror)
        return probability

    used = decode(mended)
    table = choose(default=PLAIN, mirrored=flips)
    assert [(o.mirror, o.passes) for o in used] == [(False, p) for p in (0, 1, 2)] + [(True, 1)] * flips
    gain = table.dice[False, 1, 0.5] - table.dice[False, 0, 0.5]
    # With one pass the mirror costs two passes more.
    monkeypatch.setattr(decoding_choice, "GAIN_PER_PASS", gain / 3 if worth else gain / 1.5)
    chosen = chosen_options(choose(default=PLAIN, mirrored=flips))
    assert chosen == {
        "method": "refine",
        "passes": 1,
        "threshold": 0.5,
        **({"mirror": True} if flips and worth else {}),
    }


def test_the_temperature_is_that_of_the_chosen_passes(decode) -> None:
    """Each number of passes is too sure by a factor of its own, and one pass is the best."""
    factors = {0: 1.0, 1: 2.5, 2: 4.0}

    def too_sure(passes: int, mask: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng(int(mask.sum()))
        # One in ten is wrong, more without the pass.
        wrong = rng.random(mask.shape) < (0.1 if passes else 0.3)
        odds = 9.0 ** factors[passes]
        return np.where((mask > 0) ^ wrong, odds / (1 + odds), 1 / (1 + odds))

    decode(too_sure)
    choice = choose(default=PLAIN, mirrored=False)
    assert choice.options["passes"] == 1
    temperature, found = choice.options["calibration_temperature"], choice.to_dict()["calibration"]
    truth = np.stack([Cache().pair(i).mask[0] for i in range(COUNT)])
    masks = np.stack([too_sure(1, mask) >= 0.5 for mask in truth])
    right = (masks == (truth > 0)).mean()
    # The likelihood is best where the odds are those of being right.
    assert temperature == pytest.approx(2.5 * np.log(9) / np.log(right / (1 - right)), rel=2e-3)
    assert found["calibrated"]["temperature"] == temperature and found["cases"] == COUNT and found["size"] == SIDE
    assert found["calibrated"]["nll"] < found["uncalibrated"]["nll"]


@pytest.mark.parametrize("inputs", [{"draft": 0.0}, {"replaced": 0.0}])
def test_a_model_that_has_read_no_draft_is_not_given_one(decode, inputs) -> None:
    seen = decode(lambda passes, mask: mask)
    assert choose(bundle(**inputs)).options["passes"] == 0
    assert [options.passes for options in seen] == [0]


def test_cases_are_spread_over_the_split(decode) -> None:
    rows = []
    decode(lambda passes, mask: rows.append(int(mask.sum()) - 4) or mask)
    assert choose(cases=3).cases == 3
    assert rows[:3] == [0, 2, 4]


def test_another_method_is_kept(decode) -> None:
    seen = decode(lambda passes, mask: mask)
    choice = choose_decoding(bundle(), Cache(), DecodingOptions(), progress=False)  # type: ignore[arg-type]
    assert choice.options == {"method": "greedy"} and not choice.dice and not seen
    assert choice.calibration is None and "calibration" not in choice.to_dict()
