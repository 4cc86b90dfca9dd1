"""What training adds around the decoder: drafts in place of true mask tokens, and the losses on pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ntpseg.losses.dense import (
    DenseLossOptions,
    pixel_loss,
    soft_dice_loss,
    soft_target_loss,
    to_patches,
)
from ntpseg.models.mask_inputs import BLANK, MaskInputOptions, mask_inputs

if TYPE_CHECKING:
    from ntpseg.models.config import NTPSegConfig
    from ntpseg.models.model import NTPSegModel
    from ntpseg.models.stem import StemOutput


class MaskTraining:
    """The training-only parts of an `NTPSegModel`; holds options, no weights.

    Attributes:
        inputs: how the mask tokens that are read differ from the true ones; None: not at all.
        dense: weights of the losses on pixels; None: there are none.
    """

    def __init__(self, config: NTPSegConfig) -> None:
        self.inputs = None if config.mask_inputs is None else MaskInputOptions(**config.mask_inputs)
        self.dense = None if config.dense_loss is None else DenseLossOptions(**config.dense_loss)
        rows, columns = config.mask_grid or (0, 0)
        self.cells = rows * columns

    def replace_inputs(
        self,
        model: NTPSegModel,
        input_ids: Tensor,
        grid_ids: Tensor | None,
        stem: StemOutput | None,
        decode: Callable[[Tensor], Any],
    ) -> Tensor:
        """`input_ids` with drafts, noise and blanks for mask tokens, see `MaskInputOptions`.

        Args:
            model: the model.
            input_ids, grid_ids: ``[B, T]`` int64.
            stem: its draft of the batch; None without a stem.
            decode: the decoder's output of ids ``[B, T]``.
        """
        assert self.inputs is not None and model.readout is not None
        low, high = model.config.mask_range
        places = self.places(model, grid_ids, input_ids)
        codes = input_ids.gather(1, places) - low
        with torch.no_grad():
            # Without its loss the stem's draft is not one: noise takes its share.
            trained = self.dense is not None and self.dense.pixel > 0
            draft = model.readout.nearest(stem.draft.sigmoid()) if stem is not None and trained else None
            if self.inputs.second_pass:
                own = self._one_pass(model, input_ids, places, decode)
                chosen = torch.rand(len(codes), 1, device=codes.device) < self.inputs.second_pass
                draft = own if draft is None else torch.where(chosen, own, draft)
        read = mask_inputs(codes, draft, high - low, self.inputs)
        return input_ids.scatter(1, places, torch.where(read == BLANK, model.config.blank_token, read + low))

    def _one_pass(
        self, model: NTPSegModel, input_ids: Tensor, places: Tensor, decode: Callable[[Tensor], Any]
    ) -> Tensor:
        """Codes ``[B, cells]`` nearest to the expected patches of one pass over blanks; call it without gradients."""
        assert model.readout is not None
        blanks = input_ids.scatter(1, places, torch.full_like(places, model.config.blank_token))
        hidden = decode(blanks).last_hidden_state
        return model.readout.nearest(model.readout.expected(self._logits(model, hidden, places)))

    def dense_losses(
        self,
        model: NTPSegModel,
        hidden: Tensor,
        labels: Tensor,
        grid_ids: Tensor | None,
        stem: StemOutput | None,
        mask_pixels: Tensor | None,
        num_images: float | Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and each part's mean, detached. An image without any supervised label counts nothing.

        Args:
            model: the model.
            hidden: ``[B, T, D]``.
            labels, grid_ids: ``[B, T]`` int64.
            stem: its draft; None without a stem.
            mask_pixels: ``[B, S, S]`` in {0, 1}; None takes the patches of the labels' codes.
            num_images: what to divide by; the images with a supervised label by default.

        Raises:
            ValueError: no stem's draft for the loss on it, or `grid_ids` missing.
        """
        assert self.dense is not None and model.readout is not None
        places = self.places(model, grid_ids, labels)
        supervised = (labels != -100).any(1)
        codes = torch.where(supervised[:, None], labels.gather(1, places) - model.config.mask_range[0], 0)
        if mask_pixels is None:
            target = model.readout.patches[codes]
        else:
            target = to_patches(mask_pixels.to(torch.float32), model.config.patch_size)
        parts: dict[str, tuple[float, Tensor]] = {}
        if self.dense.dice or self.dense.soft:
            logits = self._logits(model, hidden, places).float()
            if self.dense.dice:
                parts["dice"] = self.dense.dice, soft_dice_loss(model.readout.expected(logits), target)
            if self.dense.soft:
                similarity = model.readout.similarity(self.dense.soft_temperature)
                parts["soft"] = self.dense.soft, soft_target_loss(logits, codes, similarity)
        if self.dense.pixel:
            if stem is None:
                raise ValueError("stem_output must be given for the loss on the stem's draft, got None")
            parts["pixel"] = self.dense.pixel, pixel_loss(stem.draft.float(), target)
        count = supervised.sum().clamp_min(1) if num_images is None else num_images
        sums = {name: torch.where(supervised, value, 0.0).sum() / count for name, (_, value) in parts.items()}
        total = torch.zeros((), device=hidden.device)
        for name, (weight, _) in parts.items():
            total = total + weight * sums[name]
        return total, {name: value.detach() for name, value in sums.items()}

    def places(self, model: NTPSegModel, grid_ids: Tensor | None, like: Tensor) -> Tensor:
        """``[B, cells]`` int64: where the token of each mask cell stands in the sequence.

        Raises:
            ValueError: `grid_ids` is missing or not of the shape of `like`.
        """
        if grid_ids is None or grid_ids.shape != like.shape:
            shape = None if grid_ids is None else list(grid_ids.shape)
            raise ValueError(f"grid_ids must be {list(like.shape)}, as input_ids is, got {shape}")
        elsewhere = torch.iinfo(grid_ids.dtype).max
        order = torch.where(grid_ids > model.image_cells, grid_ids, elsewhere).argsort(1)
        return order[:, : self.cells]

    @staticmethod
    def _logits(model: NTPSegModel, hidden: Tensor, places: Tensor) -> Tensor:
        """``[B, cells, V]``: head 0's logits of the mask codes, from the token before each cell's."""
        before = (places - 1)[:, :, None].expand(-1, -1, hidden.shape[2])
        return model.next_token_logits(hidden.gather(1, before), vocab_range=tuple(model.config.mask_range))
