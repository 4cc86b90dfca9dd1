"""The output of a fused model that was asked for predictions in place of logits; imports transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class FusedLMOutput(ModelOutput):
    """Result of a fused model with ``skip_logits=True``.

    Attributes:
        loss: scalar.
        prediction, nll: ``[B, T]``, aligned with the position of the target; -1 and 0 where unsupervised.
        aux_loss, router_logits: of a mixture of experts, as the model returns them.
        hidden_states, attentions: as the model returns them.
    """

    loss: Tensor | None = None
    prediction: Tensor | None = None
    nll: Tensor | None = None
    aux_loss: Tensor | None = None
    router_logits: Any = None
    hidden_states: Any = None
    attentions: Any = None
