"""Tiny random models of every supported family, and prompts for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ntpseg.tokenizers.sequence import SequenceFormat
from ntpseg.tokenizers.vocabulary import Vocabulary

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 4},
    "qwen2-window": {
        "model_type": "qwen2",
        "num_key_value_heads": 4,
        "use_sliding_window": True,
        "sliding_window": 512,
        "max_window_layers": 0,
    },
    "llama": {
        "model_type": "llama",
        "num_key_value_heads": 1,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    },
}


def sequence_format(layout: str = "ntpseg") -> SequenceFormat:
    if layout == "emu3":
        return SequenceFormat(Vocabulary.emu3(codes=24, text_size=50), (4, 4), (4, 4), "emu3", (1, 2, 3), (4, 5))
    return SequenceFormat(Vocabulary(50, 32, 24), (4, 5), (3, 4))


def make_model(sequence: SequenceFormat, family: str = "qwen3", k: int = 1, grid: bool = True, seed: int = 0) -> Any:
    """A random model whose head is large enough that near-ties, which rounding could turn, do not happen."""
    from ntpseg.models.config import NTPSegConfig
    from ntpseg.models.model import NTPSegModel

    torch.manual_seed(seed)
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.08,
        "rms_norm_eps": 1e-5,
        **FAMILIES[family],
    }
    config = NTPSegConfig(
        text_config=text,
        vocab_size=sequence.vocabulary.size,
        num_heads_k=k,
        grid_positions=sequence.grid_positions if grid else 0,
        image_grid=list(sequence.image_grid),
        mask_grid=list(sequence.mask_grid),
        query_token=sequence.vocabulary.bom,
    )
    model = NTPSegModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        if k > 1:
            # Mostly agreeing drafts: some are accepted and some are not.
            model.heads.transform_weight.normal_(std=0.01)
    return model


def make_prompts(sequence: SequenceFormat, count: int, lengths: tuple[int, ...] = (0, 3, 7, 12)) -> list[np.ndarray]:
    rng = np.random.default_rng(count)
    prompts = []
    for i in range(count):
        text = rng.integers(0, sequence.vocabulary.text_size, lengths[i % len(lengths)]).tolist()
        prompts.append(sequence.prompt(text, rng.integers(0, sequence.vocabulary.image_codes, sequence.image_grid)))
    return prompts
