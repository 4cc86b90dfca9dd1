"""The kinds of deviation."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ntpseg.memory import Codebook, HardTokenMemory, token_deviation


@dataclass
class Output:
    prediction: Tensor
    nll: Tensor
    margin: Tensor


def example() -> tuple[Output, Tensor, Codebook]:
    # Codes 0..2 are tokens 10..12; token 13 is the end of the mask.
    prediction = torch.tensor([[10, 11, 12, 13, 12, -1]])
    labels = torch.tensor([[10, 10, 10, 10, 13, -100]])
    output = Output(prediction, torch.arange(6.0).view(1, 6).requires_grad_(), 5 - torch.arange(6.0).view(1, 6))
    return output, labels, Codebook(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]]), 10)


def test_codebook_distance() -> None:
    output, labels, codebook = example()
    result = token_deviation("codebook", output, labels, codebook)
    assert result[0, :5].tolist() == [0.0, 5.0, 1.0, torch.inf, torch.inf]


def test_margin_and_nll_are_the_losss_own() -> None:
    output, labels, _ = example()
    assert torch.equal(token_deviation("margin", output, labels), output.margin)
    assert torch.equal(token_deviation("nll", output, labels), output.nll)
    assert not token_deviation("nll", output, labels).requires_grad


@pytest.mark.parametrize(
    ("kind", "positions"), [("margin", [1, 2, 3, 4]), ("nll", [4, 3, 2, 1]), ("codebook", [3, 4, 1, 2])]
)
def test_each_kind_ranks_in_its_own_order(kind: str, positions: list[int]) -> None:
    output, labels, codebook = example()
    memory = HardTokenMemory(1, 5, deviation=kind)
    memory.observe(torch.tensor([0]), output, labels, codebook)
    memory.advance()
    assert memory.lookup(torch.tensor([0])).position.tolist() == [[*positions, -1]]


def test_wrong_arguments_are_named() -> None:
    output, labels, _ = example()
    with pytest.raises(ValueError, match="codebook must be the embeddings"):
        token_deviation("codebook", output, labels)
    with pytest.raises(ValueError, match="deviation must be one of margin, nll, codebook, got 'entropy'"):
        token_deviation("entropy", output, labels)
