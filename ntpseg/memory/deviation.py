"""How far a prediction is from the truth: the kinds of deviation that can rank hard errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ntpseg.utils.checks import check_choice, check_integer
from ntpseg.utils.tensor_checks import check_device, check_tensor, shown

KINDS = ("margin", "nll", "codebook")


class TokenOutput(Protocol):
    """What `ntpseg.ntp_loss` returns, as far as it is needed here: ``[B, T]`` each."""

    prediction: Tensor
    nll: Tensor
    margin: Tensor


@dataclass(frozen=True)
class Codebook:
    """The embeddings behind the code tokens.

    Attributes:
        embedding: ``[K, e]`` floating point, one row per code.
        first_token: token id of code 0; code c is token ``first_token + c``.
    """

    embedding: Tensor
    first_token: int


def token_deviation(kind: str, output: TokenOutput, labels: Tensor, codebook: Codebook | None = None) -> Tensor:
    """Compute the deviation of every predicted token from its label.

    - ``margin``: max z - z[y], in logits: how firmly the wrong token was preferred. The default.
    - ``nll``: -log p(y), in nats: how improbable the truth was. Unlike the margin it also grows with the number of
      rivals.
    - ``codebook``: Euclidean distance between the embeddings of the predicted and the true code: how different the
      decoded patch looks, whatever the model's confidence. Where only one of the two is a code, +inf: a token of
      another kind decodes to nothing.

    Args:
        kind: one of `KINDS`.
        output: the loss's output.
        labels: ``[B, T]`` int64, unshifted.
        codebook: needed by ``codebook`` alone.

    Returns:
        ``[B, T]`` floating point without a gradient. What it holds where there is no error is not used.

    Raises:
        ValueError: the kind is unknown, ``codebook`` lacks the codebook, or a tensor is not as described.
    """
    check_choice("deviation", kind, KINDS)
    check_tensor("labels", labels, "int64", ("B", "T"))
    if kind != "codebook":
        deviation = getattr(output, kind, None)
        check_tensor(f"output.{kind}", deviation, "float", tuple(labels.shape))
        return deviation.detach()  # type: ignore[union-attr]  # checked
    if not isinstance(codebook, Codebook):
        raise ValueError(
            f"codebook must be the embeddings of the codes for deviation 'codebook', got {shown(codebook)}"
        )
    check_tensor("codebook.embedding", codebook.embedding, "float", ("K", "e"))
    check_integer("codebook.first_token", codebook.first_token, 0)
    check_tensor("output.prediction", getattr(output, "prediction", None), "int64", tuple(labels.shape))
    check_device("output.prediction", output.prediction, "labels", labels.device)
    embedding = codebook.embedding.detach().to(labels.device, torch.float32)
    codes = [tokens - codebook.first_token for tokens in (output.prediction, labels)]
    known = [(code >= 0) & (code < embedding.shape[0]) for code in codes]
    rows = [embedding[torch.where(valid, code, 0)] for code, valid in zip(codes, known)]
    distance = (rows[0] - rows[1]).norm(dim=-1)
    return torch.where(known[0] & known[1], distance, torch.inf)
