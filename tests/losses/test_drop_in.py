"""Every causal language model that transformers has is equal when fused, or refused: none is different in silence."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from drop_in_table import DIFFERENT, EQUAL, NOT_BUILT, REFUSED, Row, classify, committed
from tiny_causal_lms import causal_lm_classes

CLASSES = causal_lm_classes()


@pytest.mark.slow
@pytest.mark.parametrize(("config_class", "model_class"), CLASSES, ids=[model.__name__ for _, model in CLASSES])
def test_equal_or_refused_as_the_page_says(config_class: Any, model_class: Any) -> None:
    row = classify(config_class, model_class)
    assert row.verdict != DIFFERENT, row
    version, verdicts = committed()
    if version == transformers.__version__:
        assert verdicts[row.model] == row.verdict, row


def test_the_page_lists_what_transformers_has() -> None:
    version, verdicts = committed()
    assert set(verdicts.values()) <= {EQUAL, REFUSED, NOT_BUILT}
    if version == transformers.__version__:
        assert list(verdicts) == [model.__name__ for _, model in CLASSES]
        assert sum(verdict == EQUAL for verdict in verdicts.values()) > 150


def test_a_difference_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself: a loss that is a hundredth off, and one whose gradient alone is."""
    config_class, model_class = next(pair for pair in CLASSES if pair[1].__name__ == "MixtralForCausalLM")
    assert classify(config_class, model_class) == Row("MixtralForCausalLM", EQUAL)
    import drop_in_table

    fuse = drop_in_table.fuse_causal_lm

    def wrong(model: Any, **keywords: Any) -> Any:
        fuse(model, **keywords)
        model.model.norm.register_forward_hook(lambda module, args, out: out + 0.01 * (out - out.detach()))
        return model

    monkeypatch.setattr(drop_in_table, "fuse_causal_lm", wrong)
    assert classify(config_class, model_class).verdict == DIFFERENT
