"""What the drop-in functions are given: everything wrong is a ValueError that names it, and nothing is left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_llama import batch, build
from torch import nn
from torch.nn import functional as F

from ntpseg.losses.fused_cross_entropy import fused_cross_entropy
from ntpseg.losses.huggingface import fuse_causal_lm


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None,), "model must be a causal language model with an output head, got None"),
        (("gpt2",), "model must be a causal language model with an output head, got a str"),
        ((nn.Linear(2, 2), {"negatives": 1}), "options must be a LossOptions, got a dict"),
    ],
)
def test_fusing_refuses(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        fuse_causal_lm(*arguments)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"check": None}, "check must be True or False, got None"),
        ({"skip_logits": "yes"}, "skip_logits must be True or False, got 'yes'"),
        ({"negatives": 2.0}, "negatives must be an integer >= 0, got 2.0"),
        ({"vocab_range": (None, 9)}, "vocab_range must be two integers (lo, hi) with 0 <= lo < hi, got (None, 9)"),
    ],
)
def test_its_options_are_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        fuse_causal_lm(build(), **keywords)
    assert str(refused.value) == message


def test_half_of_the_hard_tokens_is_not_none() -> None:
    model, inputs = fuse_causal_lm(build(), check=False), batch()
    slots = torch.zeros(len(inputs["labels"]), 2, dtype=torch.int64)
    for given, missing in (("het_position", "het_token"), ("het_token", "het_position")):
        with pytest.raises(ValueError, match=rf"^{missing} must be given with {given}, got None"):
            model(**inputs, **{given: slots})


def test_a_batch_is_checked_as_the_loss_does() -> None:
    model, inputs = fuse_causal_lm(build(), check=False), batch()
    classes = model.config.vocab_size
    labels = inputs["labels"].clone()
    labels[0, -1] = classes
    with pytest.raises(ValueError, match=rf"^labels must be ignore_index or in \[0, {classes}\), got {classes}$"):
        model(**{**inputs, "labels": labels})
    with pytest.raises(ValueError, match=r"^token_weights must be finite and >= 0 where there is a label, got nan"):
        model(**inputs, token_weights=torch.full(labels.shape, torch.nan))
    with pytest.raises(ValueError, match=r"^num_items\.rows must be finite and >= 0, got \[nan\]"):
        model(**inputs, num_items_in_batch=torch.tensor(torch.nan))


@pytest.mark.parametrize("head", [None, 5, nn.Conv1d(2, 2, 1)], ids=str)
def test_only_a_linear_head_is_fused(head: Any) -> None:
    with (
        pytest.raises(ValueError, match=r"^the output head must be a plain linear layer, got "),
        fused_cross_entropy(head),
    ):
        pass


@pytest.mark.parametrize(
    ("target", "more", "message"),
    [
        (torch.tensor([0, 1, 7]), {}, "labels must be ignore_index or in [0, 7), got 7"),
        (torch.tensor([0, 1]), {}, "target must be an int64 tensor for [3, 7] logits, got int64 [2]"),
        (torch.ones(3) > 0, {}, "target must be an int64 tensor for [3, 7] logits, got bool [3]"),
        (torch.tensor([0, 1, 2]), {"weight": torch.ones(6)}, "weight must be a float [7] tensor, got float32 [6]"),
        (torch.tensor([0, 1, 2]), {"weight": torch.ones(7).int()}, "weight must be a float [7] tensor, got int32 [7]"),
        (torch.tensor([0, 1, 2]), {"weight": -torch.ones(7)}, "token_weights must be finite and >= 0 where there"),
        (torch.tensor([0, 1, 2]), {"label_smoothing": 2.0}, "label_smoothing must be a number >= 0 and < 1, got 2.0"),
        (torch.tensor([0, 1, 2]), {"reduction": "max"}, "reduction must be mean, sum or none, got 'max'"),
    ],
)
def test_cross_entropy_refuses(target: torch.Tensor, more: dict[str, Any], message: str) -> None:
    head = nn.Linear(4, 7)
    with fused_cross_entropy(head, negatives=0), pytest.raises(ValueError) as refused:
        F.cross_entropy(head(torch.randn(3, 4)), target, **more)
    assert str(refused.value).startswith(message)
