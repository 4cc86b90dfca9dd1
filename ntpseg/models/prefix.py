"""The attention mask of a prefix language model: the prompt sees itself in both directions, the mask is causal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from ntpseg.models import causal_blocks
from ntpseg.models.packing import PackedRows, packed_arguments
from ntpseg.utils.transformers_compat import CACHE


def prefix_mask(
    config: Any, embeds: Tensor, attention_mask: Tensor | None, prefix: Tensor, packed: PackedRows | None = None
) -> Any:
    """The mask that the configured attention implementation takes.

    Args:
        config: the Hugging Face decoder's; its attention implementation decides the mask's form.
        embeds: ``[B, T, D]``, or ``[R, L, D]`` of packed rows.
        attention_mask: ``[B, T]``, 0 at padding, or None.
        prefix: ``[B]`` int64, tokens of each sequence's prompt.
        packed: where the sequences lie in `embeds`; None: each in a row of its own.

    Raises:
        ValueError: the implementation takes no mask (FlashAttention).
    """
    if "flash" in str(config._attn_implementation):
        raise ValueError(
            f"attention must be sdpa, eager, flex, xformers or causal_blocks with prefix_lm, "
            f"got {config._attn_implementation!r}, which takes no mask"
        )

    def within_prompt(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query < prefix[batch]) & (key < prefix[batch])

    within: Any = within_prompt
    same: Any = None
    if packed is not None:
        prompt = (packed.source >= 0) & (packed.position < prefix[packed.sample.clamp_min(0)])
        segment = packed.segment

        def within_packed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return prompt[batch, query] & prompt[batch, key]

        def same_sequence(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return segment[batch, query] == segment[batch, key]

        within, same = within_packed, same_sequence

    return create_causal_mask(
        config=config,
        inputs_embeds=embeds,
        attention_mask=attention_mask,
        position_ids=None,
        or_mask_function=within,
        and_mask_function=same,
        **{CACHE: None},
    )


def prefix_arguments(
    config: Any, embeds: Tensor, attention_mask: Tensor | None, prefix: Tensor, packed: PackedRows | None = None
) -> dict[str, Any]:
    """What a Hugging Face decoder must be given for bidirectional prompts.

    Args:
        config, embeds, attention_mask, prefix, packed: see `prefix_mask`.

    Raises:
        ValueError: the implementation takes no mask (FlashAttention).
    """
    by_lengths = config._attn_implementation == causal_blocks.NAME and attention_mask is None
    mask = None if by_lengths else prefix_mask(config, embeds, attention_mask, prefix, packed)
    arguments: dict[str, Any] = {"attention_mask": mask}
    if packed is not None:
        arguments = packed_arguments(packed, config._attn_implementation, mask)
    if by_lengths:
        if packed is None:
            # A mask of four dimensions is handed on as it is: none need be made where none is read.
            arguments["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeds.device)
        else:
            sample = packed.sample.flatten()[packed.bounds[:-1].long()]
            prefix = torch.where(sample >= 0, prefix[sample.clamp_min(0)], 0)
        arguments["prefix_lengths"] = prefix
    return arguments


def prompt_lengths(grid_ids: Tensor, image_cells: int) -> Tensor:
    """``[B]`` int64: tokens before each row's first mask token, all of them where there is none."""
    is_mask = grid_ids > image_cells
    first = is_mask.int().argmax(1)
    return torch.where(is_mask.any(1), first, grid_ids.shape[1])
