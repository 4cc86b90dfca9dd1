"""The pairing with another image's text."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from ntpseg.evaluation.text_check import other_texts


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=60), st.integers(0, 3))
def test_every_text_differs_and_is_one_of_the_data(texts: list[str], seed: int) -> None:
    result = other_texts(texts, seed)
    if len(set(texts)) == 1:
        assert result is None
        return
    assert result is not None
    assert all(a != b for a, b in zip(result, texts, strict=True))
    assert set(result) <= set(texts)
    assert result == other_texts(texts, seed)
    if 2 * max(Counter(texts).values()) <= len(texts):
        assert Counter(result) == Counter(texts)


def test_pairing_is_not_one_fixed_partner_per_text() -> None:
    texts = [f"text {i % 10}" for i in range(100)]
    result = other_texts(texts)
    assert result is not None
    assert len(set(zip(texts, result, strict=True))) >= 10
