"""Configuration of `NTPSegModel`: a nested Hugging Face decoder config plus heads, loss and grid positions."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

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
        image_grid, mask_grid: ``[rows, columns]`` of the image's and the mask's token grid.
        query_token: id of the token that precedes the first mask token (BOM), so that it receives the first
            cell's "next cell" embedding.
        image_range, mask_range: ``[lo, hi)`` ids of the image and mask codes, for `NTPSegModel.init_visual_embeddings`.
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
            if self.image_grid is None or self.mask_grid is None:
                grids = f"{self.image_grid} and {self.mask_grid}"
                raise ValueError(f"image_grid and mask_grid must be given with grid_positions, got {grids}")
            cells = self.image_grid[0] * self.image_grid[1] + self.mask_grid[0] * self.mask_grid[1]
            if self.grid_positions != cells:
                raise ValueError(
                    f"grid_positions must be the cells of image_grid and mask_grid, {cells}, got {self.grid_positions}"
                )
        for name in ("image_grid", "mask_grid"):
            grid = getattr(self, name)
            setattr(self, name, None if grid is None else [int(x) for x in grid])

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
