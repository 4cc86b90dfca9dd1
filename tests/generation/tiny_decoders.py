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
        codes = sequence.image_grid and rng.integers(0, sequence.vocabulary.image_codes, sequence.image_grid)
        prompts.append(sequence.prompt(text, codes))
    return prompts


def feature_format(front_end: str = "features", aligned: bool = True) -> SequenceFormat:
    """A 4 x 4 grid; image tokens where the front end reads codes, or where features stand in their places."""
    codes = 32 if front_end == "both" else 0 if aligned else 1
    return SequenceFormat(Vocabulary(50, codes, 24), (4, 4) if codes else None, (4, 4))


def make_feature_model(
    sequence: SequenceFormat,
    family: str = "qwen3",
    front_end: str = "features",
    *,
    aligned: bool = True,
    prefix_lm: bool = False,
    k: int = 1,
    seed: int = 0,
    **options: Any,
) -> Any:
    """A random model with a stem for 16 x 16 grey images, trained (so its configuration says) on blanks."""
    from ntpseg.models.config import NTPSegConfig
    from ntpseg.models.model import NTPSegModel

    torch.manual_seed(seed)
    vocabulary = sequence.vocabulary
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.08,
        **FAMILIES[family],
    }
    fields: dict[str, Any] = {
        "text_config": text,
        "vocab_size": vocabulary.size,
        "vocab_range": list(vocabulary.supervised_range),
        "num_heads_k": k,
        "grid_positions": sequence.grid_positions,
        "image_grid": None if sequence.image_grid is None else list(sequence.image_grid),
        "mask_grid": list(sequence.mask_grid),
        "query_token": vocabulary.bom,
        "image_range": list(vocabulary.image_range) if vocabulary.image_codes else None,
        "mask_range": list(vocabulary.mask_range),
        "front_end": front_end,
        "image_size": 16,
        "text_size": vocabulary.text_size,
        "blank_token": vocabulary.pad,
        "patch_size": 4,
        "mask_inputs": {},
        "prefix_lm": prefix_lm,
    }
    if front_end != "codes":
        fields["stem"] = {
            "widths": [8, 16],
            "group_size": 4,
            "caption_dim": 8,
            "caption_hidden": 8,
            "aligned": aligned,
        }
    model = NTPSegModel(NTPSegConfig(**{**fields, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.05))
        model.readout.set_patches(torch.rand(vocabulary.mask_codes, *[model.config.patch_size] * 2))
        if k > 1:
            model.heads.transform_weight.normal_(std=0.02)
    return model


def full_hidden(
    model: Any, sequence: SequenceFormat, prompt: np.ndarray, tokens: np.ndarray | list[int], pixels: np.ndarray | None
) -> torch.Tensor:
    """``[len(tokens) + 1, D]``: what predicts each mask token and the next, of one forward without any cache."""
    ids = torch.tensor(np.concatenate([prompt, np.asarray(tokens, np.int64)]))[None]
    # From the places and not the ids: blanks stand in their cells as codes do.
    grid = np.concatenate([sequence.grid_ids(prompt), sequence.target_grid_ids[: len(tokens)]])
    values = None if pixels is None else torch.from_numpy(pixels)[None]
    with torch.no_grad():
        out = model(ids, grid_ids=torch.from_numpy(grid)[None], pixel_values=values)
    return out.last_hidden_state[0, len(prompt) - 1 :]


def mask_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of the mask codes, from the definition of head 0."""
    low, high = model.config.mask_range
    with torch.no_grad():
        return hidden @ model.heads.weight[low:high].T


def make_images(count: int, size: int = 16, channels: int = 1) -> np.ndarray:
    """Float32 ``[count, channels, size, size]`` in [-1, 1]."""
    return np.random.default_rng(3).uniform(-1, 1, (count, channels, size, size)).astype(np.float32)
