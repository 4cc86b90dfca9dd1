"""Floating-point operations of a training step, by the one formula that training logs and benchmarks share.

The model's own work: six operations per weight of a linear layer and token (one multiply-add forward, two backward),
half of twelve per layer, pair of tokens and attention feature, since causal attention looks at half of the pairs
(PaLM, arXiv 2204.02311, appendix B, for the factors). What recomputation, padding or a second pass adds is no part of
it, so that the utilisation falls when a run spends time on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ntpseg.models.front_end import FrontEnd

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ntpseg.models.config import NTPSegConfig
    from ntpseg.models.model import NTPSegModel

# Forward, and the gradients of inputs and weights.
_PASSES = 3


@dataclass(frozen=True)
class TrainingFlops:
    """What a training step costs per unit of its batch, in floating-point operations.

    Attributes:
        token: of the decoder's linear layers, per token.
        square: of attention, per squared length of a sequence.
        row: of the output matrix, per supervised row of any head.
        later_row: of the transforms of heads 1 to k - 1, per supervised row of such a head.
        image: of the image front end and of the logits of losses on pixels, per image.
    """

    token: float
    square: float
    row: float
    later_row: float = 0.0
    image: float = 0.0

    @classmethod
    def of(cls, model: NTPSegModel) -> TrainingFlops:
        """Of a model, also where ranks share its weights: sizes are read from layers and configuration."""
        config, text = model.config, model.config.text_config
        linear = [m for m in model.backbone.modules() if isinstance(m, nn.Linear)]
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        low, high = config.vocab_range or (0, config.vocab_size)
        return cls(
            token=2.0 * _PASSES * sum(m.in_features * m.out_features for m in linear),
            square=2.0 * _PASSES * text.num_hidden_layers * text.num_attention_heads * head_dim,
            row=2.0 * _PASSES * (high - low) * config.hidden_size,
            later_row=2.0 * _PASSES * config.hidden_size**2,
            image=_PASSES * (_front_end(config) + _pixel_logits(config)),
        )

    def step(self, *, tokens: float, squares: float, rows: Sequence[float], images: float = 0.0) -> float:
        """Operations of a whole step, all micro-batches and ranks together.

        Args:
            tokens: of all sequences, padding left out.
            squares: sum of the squared lengths of the sequences; packed ones count one by one.
            rows: supervised rows of each head, k numbers.
            images: sequences.
        """
        operations = self.token * tokens + self.square * squares + self.image * images
        return operations + self.row * sum(rows) + self.later_row * sum(rows[1:])


def _front_end(config: NTPSegConfig) -> float:
    """Operations of the image front end's forward pass for one image; 0 where no copy of it can be made."""
    if config.front_end == "codes":
        return 0.0
    from torch.utils.flop_counter import FlopCounterMode

    # A copy without storage: the model's own weights may lie on other ranks, and dropout would draw random numbers.
    try:
        with torch.device("meta"), torch.no_grad():
            front_end: Any = FrontEnd(config)
            pixels = torch.empty(1, config.channels, config.image_size, config.image_size)
            ids = torch.empty(1, 1, dtype=torch.int64)
            embeds = torch.empty(1, 1, config.hidden_size)
            with FlopCounterMode(display=False) as counter:
                front_end(pixels, ids, embeds)
    except Exception:  # another library's encoder that needs storage, or that ZeRO-3 divides as it is made
        return 0.0
    return float(counter.get_total_flops())


def _pixel_logits(config: NTPSegConfig) -> float:
    """Operations of the logits that losses on expected pixels read, forward, for one image."""
    dense = config.dense_loss or {}
    if not (dense.get("dice") or dense.get("soft")) or config.mask_range is None or config.mask_grid is None:
        return 0.0
    cells = config.mask_grid[0] * config.mask_grid[1]
    return 2.0 * cells * (config.mask_range[1] - config.mask_range[0]) * config.hidden_size
