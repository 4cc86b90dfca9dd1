"""Configuration of `NTPSegModel`: a nested Hugging Face decoder config plus heads, loss and grid positions."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from ntpseg.losses.dense import DenseLossOptions
from ntpseg.models.mask_inputs import MaskInputOptions
from ntpseg.models.stem import FRONT_ENDS, StemOptions
from ntpseg.utils.checks import check_choice, check_integer

BACKBONES = ("llama", "qwen2", "qwen3")


class NTPSegConfig(PreTrainedConfig):
    """Everything that `NTPSegModel` needs besides its weights.

    Args:
        text_config: Hugging Face config (or its dict, with ``model_type``) of the causal decoder; one of `BACKBONES`.
            Its ``vocab_size`` is set to `vocab_size`.
        vocab_size: number of tokens V of the whole sequence (text, special, image and mask tokens).
        num_heads_k: k, how many next tokens each position predicts (1 = plain next-token prediction).
        negatives: m of the token-level contrastive loss (TCL), 0 switches it off.
        tcl_weight, het_weight: weights of TCL and of the hard error tokens (HET) in the loss.
        temperature: tau of TCL and HET.
        vocab_range: ``[lo, hi)`` to which softmax and arg-max are restricted, normally the supervised tokens; None:
            the whole vocabulary.
        tie_word_embeddings: the heads' output matrix is the embedding of the tokens.
        head_weights: weight of each of the k heads in the loss, None = all 1.
        grid_positions: number of grid cells that have learned two-dimensional position embeddings, 0 = none. When on it
            equals the cells of `image_grid` plus those of `mask_grid`.
        image_grid, mask_grid: ``[rows, columns]`` of the image's and the mask's token grid; no image grid where the
            image is not read as tokens.
        query_token: id of the token that precedes the first mask token (BOM), so that it receives the first
            cell's "next cell" embedding.
        image_range, mask_range: ``[lo, hi)`` ids of the image and mask codes, for `NTPSegModel.init_visual_embeddings`;
            no image range where there are no image codes.
        front_end: how the image is read: ``codes`` (tokens, the paper's), ``features`` of a convolutional stem or
            pretrained encoder, or ``both``.
        stem: fields of `StemOptions`; for the front ends ``features`` and ``both``.
        channels, image_size: C and S of the images that the stem reads.
        text_size: ids below it are text, see `Vocabulary`; for the stem's caption.
        blank_token: id that stands for a mask token that is not known (the padding token), -1 = none.
        patch_size: P, pixels of a mask token's side, of the expected-patch read-out; 0 = the model has none.
        mask_inputs: fields of `MaskInputOptions`, which mask tokens are read in training; None: the true ones.
        dense_loss: fields of `DenseLossOptions`; None: the loss on tokens alone.
        prefix_lm: tokens of the prompt see each other in both directions (prefix language model, arXiv 1910.10683).
    """

    model_type = "ntpseg"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]

    text_config: Any = None
    vocab_size: int = 0
    num_heads_k: int = 1
    negatives: int = 5
    tcl_weight: float = 1.0
    het_weight: float = 1.0
    temperature: float = 1.0
    vocab_range: Any = None
    head_weights: Any = None
    grid_positions: int = 0
    image_grid: Any = None
    mask_grid: Any = None
    query_token: int = -1
    image_range: Any = None
    mask_range: Any = None
    front_end: str = "codes"
    stem: Any = None
    channels: int = 1
    image_size: int = 0
    text_size: int = 0
    blank_token: int = -1
    patch_size: int = 0
    mask_inputs: Any = None
    dense_loss: Any = None
    prefix_lm: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        text = {"model_type": "qwen2"} if self.text_config is None else self.text_config
        if isinstance(text, dict):
            text = dict(text)
            model_type = text.pop("model_type", "qwen2")
            check_choice("text_config.model_type", model_type, BACKBONES)
            text = AutoConfig.for_model(model_type, **text)
        check_choice("text_config.model_type", text.model_type, BACKBONES)
        self.text_config = text
        self.vocab_size = self.vocab_size or text.vocab_size
        text.vocab_size = self.vocab_size
        text.use_cache = False
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        check_integer("num_heads_k", self.num_heads_k, 1)
        for name in ("vocab_range", "image_range", "mask_range"):
            span = getattr(self, name)
            if span is not None:
                lo, hi = span
                if not 0 <= lo < hi <= self.vocab_size:
                    raise ValueError(
                        f"{name} must be (lo, hi) with 0 <= lo < hi <= vocab_size, {self.vocab_size}, got {tuple(span)}"
                    )
                setattr(self, name, [int(lo), int(hi)])
        if self.grid_positions:
            if self.mask_grid is None:
                raise ValueError("mask_grid must be given with grid_positions, got None")
            cells = sum(rows * columns for rows, columns in (self.image_grid or (0, 0), self.mask_grid))
            if self.grid_positions != cells:
                raise ValueError(
                    f"grid_positions must be the cells of image_grid and mask_grid, {cells}, got {self.grid_positions}"
                )
        for name in ("image_grid", "mask_grid"):
            grid = getattr(self, name)
            setattr(self, name, None if grid is None else [int(x) for x in grid])
        self._check_front_end()

    def _check_front_end(self) -> None:
        check_choice("front_end", self.front_end, FRONT_ENDS)
        needs = {
            "front_end": self.front_end != "codes",
            "mask_inputs": self.mask_inputs is not None,
            "dense_loss": self.dense_loss is not None,
        }
        for name in (name for name, needed in needs.items() if needed):
            if not self.patch_size or self.mask_grid is None or self.mask_range is None or self.blank_token < 0:
                raise ValueError(
                    f"patch_size, mask_grid, mask_range and blank_token must be given with {name}, got "
                    f"{self.patch_size}, {self.mask_grid}, {self.mask_range} and {self.blank_token}"
                )
        # Normalised, so that a field that an options class gains later has its default in older models.
        if self.front_end != "codes":
            self.stem = asdict(StemOptions(**(self.stem or {})))
            sides = [cells * self.patch_size for cells in self.mask_grid]
            if sides != [self.image_size] * 2:
                raise ValueError(f"image_size must be mask_grid times patch_size, {sides}, got {self.image_size}")
            if not self.stem["aligned"] and self.image_grid != self.mask_grid:
                raise ValueError(
                    f"image_grid must be mask_grid, {self.mask_grid}, with stem.aligned False, got {self.image_grid}"
                )
        if self.mask_inputs is not None:
            self.mask_inputs = asdict(MaskInputOptions(**self.mask_inputs))
        if self.dense_loss is not None:
            self.dense_loss = asdict(DenseLossOptions(**self.dense_loss))
            if self.dense_loss["pixel"] and self.front_end == "codes":
                raise ValueError(
                    "dense_loss.pixel must be 0 with front_end 'codes', which has no stem, got "
                    f"{self.dense_loss['pixel']}"
                )

    @property
    def hidden_size(self) -> int:
        """Width D of the decoder."""
        return self.text_config.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the decoder."""
        return self.text_config.num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        """Attention heads of the decoder."""
        return self.text_config.num_attention_heads

    @property
    def initializer_range(self) -> float:
        """Standard deviation of freshly drawn weights."""
        return self.text_config.initializer_range
