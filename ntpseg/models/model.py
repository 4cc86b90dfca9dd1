"""`NTPSegModel`: a Hugging Face causal decoder that returns hidden states, with k heads that compute the loss.

What training adds to the loss on tokens, the reading of drafts and the losses on pixels, is in `MaskTraining`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import ModelOutput

from ntpseg.losses import NTPOutput, NumItems
from ntpseg.memory import HardTokens
from ntpseg.models import causal_blocks, sequence_parallel, xformers_attention
from ntpseg.models.code_embeddings import code_embeddings
from ntpseg.models.config import NTPSegConfig
from ntpseg.models.front_end import FrontEnd
from ntpseg.models.grid import GridEmbedding
from ntpseg.models.heads import NextKHeads
from ntpseg.models.image_encoder import CaptionModulation, Convolution
from ntpseg.models.mask_training import MaskTraining
from ntpseg.models.packing import PackedRows, packed_arguments
from ntpseg.models.prefix import prefix_arguments, prompt_lengths
from ntpseg.models.readout import PatchReadout
from ntpseg.models.rms_norm import replace_norms
from ntpseg.models.rotary import replace_rotary
from ntpseg.models.sequence_parallel import SequenceGroup, sequence_arguments
from ntpseg.models.sharded_init import SHARDS
from ntpseg.models.stem import StemOutput
from ntpseg.utils.transformers_compat import CACHE

causal_blocks.register()
xformers_attention.register()
sequence_parallel.register()


@dataclass
class NTPSegOutput(ModelOutput):
    """Result of `NTPSegModel`.

    Attributes:
        loss: scalar, differentiable; None without labels, as are the parts and the per-token results.
        ntp, nktp, tcl, het: detached scalars, see `ntpseg.ntp_loss`.
        dice, pixel, soft: detached scalars, see `DenseLossOptions`; None where they are switched off.
        prediction, nll, margin: ``[B, T]``, head 0, aligned with the target's position; -1 / 0 / 0 where unsupervised.
        last_hidden_state: ``[B, T, D]``.
        cache: the decoding cache, with ``use_cache=True``; also called past_key_values.
        hidden_states, attentions: of every layer, with ``output_hidden_states=True`` and ``output_attentions=True``.
    """

    loss: Tensor | None = None
    ntp: Tensor | None = None
    nktp: Tensor | None = None
    tcl: Tensor | None = None
    het: Tensor | None = None
    dice: Tensor | None = None
    pixel: Tensor | None = None
    soft: Tensor | None = None
    prediction: Tensor | None = None
    nll: Tensor | None = None
    margin: Tensor | None = None
    last_hidden_state: Tensor | None = None
    cache: Any = None
    hidden_states: Any = None
    attentions: Any = None

    @property
    def past_key_values(self) -> Any:
        """`cache` under the name that it had in transformers before 5.24."""
        return self.cache


class NTPSegModel(PreTrainedModel):
    """Reads ``text, image tokens, mask tokens`` and predicts the next k tokens at every position.

    The loss on tokens materialises no logits: the module that owns the heads' weight computes it, as ZeRO-3 and FSDP
    need. Losses on pixels, where they are configured, make the logits of the mask codes.
    The configuration is copied, since Hugging Face models otherwise share it (and with it the attention
    implementation).
    """

    config_class = NTPSegConfig
    config: NTPSegConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    _tied_weights_keys = {"heads.weight": "backbone.embed_tokens.weight"}  # noqa: RUF012  # declared as an instance variable in the base class
    supports_gradient_checkpointing = True
    # The Trainer passes the counts of the whole accumulated batch, and the loss is divided by them here.
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    grid: GridEmbedding | None
    front_end: FrontEnd | None
    readout: PatchReadout | None

    def __init__(self, config: NTPSegConfig) -> None:
        super().__init__(copy.deepcopy(config))
        config, text = self.config, self.config.text_config
        # The plain constructor: `from_config` would partition this sub-model alone under ZeRO-3.
        self.backbone = cast(Any, MODEL_MAPPING[type(text)])(text)
        replace_norms(self.backbone)
        replace_rotary(self.backbone)
        self.heads = NextKHeads(config.hidden_size, config.vocab_size, config.num_heads_k)
        self.grid = None
        if config.grid_positions:
            image_grid = None if config.image_grid is None else tuple(config.image_grid)
            self.grid = GridEmbedding(image_grid, tuple(config.mask_grid), config.hidden_size)
        self.front_end = FrontEnd(config) if config.front_end != "codes" else None
        if self.front_end is not None and not (config.dense_loss or {}).get("pixel"):
            # Nothing trains the draft then, and weights without a gradient stop data-parallel training.
            self.front_end.stem.draft.requires_grad_(False)
        self.readout = None
        if config.patch_size:
            self.readout = PatchReadout(config.mask_range[1] - config.mask_range[0], config.patch_size)
        self.mask_training = MaskTraining(config)
        self.sequence_group: SequenceGroup | None = None
        self._no_split_modules = list(self.backbone._no_split_modules or [])
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # Only modules that own parameters come here: transformers takes the others to be initialised.
        std = self.config.initializer_range
        if isinstance(module, GridEmbedding):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=std)
        elif isinstance(module, NextKHeads):
            module.init_weights(std, init.normal_, init.zeros_)
        elif isinstance(module, (Convolution, CaptionModulation)):
            module.init_weights(init.uniform_, init.zeros_)
        elif isinstance(module, PatchReadout):
            init.zeros_(module.patches)
        else:
            super()._init_weights(module)

    def share_sequences(self, group: Any) -> None:
        """Share each sequence, and the classes of the loss, with the ranks of a process group; see `SequenceGroup`.

        From now on all of them must call `forward` with the same batch.

        Raises:
            ValueError: the attention heads cannot be divided, or an option of the model needs whole sequences.
        """
        text = self.backbone.config
        ranks = SequenceGroup(group, text._attn_implementation)
        sequence_parallel.check_shareable(self.config, text, ranks.size)
        self.sequence_group = ranks
        text._attn_implementation = sequence_parallel.NAME

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of all tokens, ``[V, D]``."""
        return self.backbone.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding of all tokens."""
        self.backbone.embed_tokens = value

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in Hugging Face, the heads' output matrix and the sizes in the configuration included.

        Raises:
            ValueError: a range of ids in the configuration would end beyond the vocabulary, or ZeRO-3 has the weights.
        """
        config = self.config
        if hasattr(self.heads.weight, "ds_id"):
            raise ValueError("weights must be whole to resize them, got those that ZeRO-3 has partitioned")
        ends = [span[1] for span in (config.vocab_range, config.image_range, config.mask_range) if span is not None]
        if new_num_tokens is not None and ends and new_num_tokens < max(ends):
            raise ValueError(f"new_num_tokens must be >= {max(ends)}, where a range of ids ends, got {new_num_tokens}")
        embedding = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.heads.resize(embedding.num_embeddings)
        config.vocab_size = config.text_config.vocab_size = embedding.num_embeddings
        self.tie_weights()
        return embedding

    @torch.no_grad()
    def init_visual_embeddings(
        self, image_codebook: Tensor | None, mask_codebook: Tensor, generator: torch.Generator | None = None
    ) -> None:
        """Start the embeddings of the visual codes from the codebooks, see `code_embeddings`.

        Args:
            image_codebook, mask_codebook: ``[codes, e]`` float, as a vision tokenizer gives them; None without image
                codes.
            generator: source of the projections.

        Raises:
            ValueError: the configuration has no ranges of codes, or a codebook of another size.
        """
        weight, shards = self.get_input_embeddings().weight, getattr(self, SHARDS, None)
        for first, rows in code_embeddings(self.config, weight.shape[1], image_codebook, mask_codebook, generator):
            if shards is None:
                weight[first : first + len(rows)] = rows.to(weight)
            else:
                shards.write_rows(weight, first, rows)

    @property
    def image_cells(self) -> int:
        """Number of image tokens in a sequence."""
        grid = self.config.image_grid
        return 0 if grid is None else grid[0] * grid[1]

    def encode_image(
        self, pixel_values: Tensor | None, input_ids: Tensor, image_of: Tensor | None = None
    ) -> StemOutput:
        """Features and draft of every mask cell, for the front ends ``features`` and ``both``.

        Args:
            pixel_values: ``[B, C, S, S]`` float in [-1, 1].
            input_ids: ``[B, T]`` int64, the prompt or more; its text tokens condition the stem.
            image_of: ``[B]`` int64: `pixel_values` holds U images, and row b reads the one at ``image_of[b]``.

        Raises:
            ValueError: the model has no stem, or the pixels are missing or not of its size.
        """
        if self.front_end is None:
            raise ValueError("front_end must be features or both for pixels to be read, got 'codes'")
        config = self.config
        images = len(input_ids) if image_of is None or pixel_values is None else len(pixel_values)
        wanted = [images, config.channels, config.image_size, config.image_size]
        if pixel_values is None or list(pixel_values.shape) != wanted:
            shape = None if pixel_values is None else list(pixel_values.shape)
            raise ValueError(f"pixel_values must be {wanted}, got {shape}")
        return self.front_end(pixel_values, input_ids, self.get_input_embeddings()(input_ids), image_of)

    def embed(self, input_ids: Tensor, grid_ids: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """What the backbone reads: the embeddings of tokens ``[B, T]`` and of their grid cells, ``[B, T, D]``.

        Args:
            input_ids: ``[B, T]`` int64.
            grid_ids: ``[B, T]`` int64; needed with grid positions and with a stem.
            features: ``[B, cells, D]``, see `encode_image`; needed with a stem.

        Raises:
            ValueError: `grid_ids` or `features` are needed and missing, or not of the right shape.
        """
        embeds = self.get_input_embeddings()(input_ids)
        if self.grid is None and self.front_end is None:
            return embeds
        if grid_ids is None or grid_ids.shape != input_ids.shape:
            shape = None if grid_ids is None else list(grid_ids.shape)
            raise ValueError(f"grid_ids must be {list(input_ids.shape)}, as input_ids is, got {shape}")
        if self.grid is not None:
            embeds = embeds + self.grid(grid_ids, input_ids == self.config.query_token)
        if self.front_end is not None:
            if features is None:
                raise ValueError(f"features must be given with front_end {self.config.front_end!r}, got None")
            embeds = self.front_end.inject(embeds, features, input_ids, grid_ids)
        return embeds

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        grid_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        het_position: Tensor | None = None,
        het_token: Tensor | None = None,
        num_items: NumItems | float | Tensor | None = None,
        loss_start: int | None = None,
        pixel_values: Tensor | None = None,
        mask_pixels: Tensor | None = None,
        num_images: float | Tensor | None = None,
        stem_output: StemOutput | None = None,
        inputs_embeds: Tensor | None = None,
        packing: Mapping[str, Tensor] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> NTPSegOutput | tuple[Any, ...]:
        """Hidden states and, with labels, the loss.

        Args:
            input_ids: ``[B, T]`` int64. Pad on the right: causal attention then needs no mask.
            labels: ``[B, T]`` int64, unshifted, -100 where unsupervised.
            grid_ids: ``[B, T]`` int64, see `SequenceFormat.grid_ids`; needed when the configuration has grid positions,
                a stem, mask inputs, losses on pixels or a prefix mask.
            attention_mask, position_ids, past_key_values, use_cache: as in Hugging Face.
            het_position, het_token: ``[B, n]`` int64, hard error tokens, see `ntpseg.HardTokens`.
            num_items: counts of the whole accumulated and global batch, see `ntpseg.NumItems`.
            loss_start: no label before this position is supervised; the heads skip the prompt. Read from `labels`
                where it is not given, which on a GPU waits for the device.
            pixel_values: ``[B, C, S, S]`` float in [-1, 1], for the front ends ``features`` and ``both``.
            mask_pixels: ``[B, S, S]`` in {0, 1}, for the losses on pixels; the patches of the labels' codes by default.
            num_images: images of the whole accumulated and global batch, by which the losses on pixels are divided;
                those with a supervised label by default.
            stem_output: what `encode_image` returned, instead of `pixel_values`.
            inputs_embeds: ``[B, T, D]`` in place of `input_ids`, as `embed` makes them (with the grid's and the stem's
                part).
            packing: ``PackedRows.tensors()`` of the batch: the decoder reads rows of several sequences without their
                padding. Arguments and results keep the form ``[B, T]``; what lies behind a sequence's end is undefined.
                Not with `attention_mask`, `position_ids` or a cache.
            return_dict: False: a tuple of what is not None.
            **kwargs: passed to the backbone, such as ``cu_seq_lens_q`` of packed sequences or ``output_hidden_states``.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds` is given, or what the configuration needs is
                missing or not of the right shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given, got both or neither")
        packed: PackedRows | None = None
        if packing is not None:
            if attention_mask is not None or position_ids is not None or past_key_values is not None or use_cache:
                raise ValueError("attention_mask, position_ids and the cache must be left out with packing, got one")
            given: Any = input_ids if inputs_embeds is None else inputs_embeds
            packed = PackedRows.of(packing, *given.shape[:2])
        stem = stem_output
        if self.front_end is not None and stem is None and input_ids is not None:
            # A sequence with labels ends in a whole mask: reading the caption in front of it alone saves time.
            until = None if labels is None else input_ids.shape[1] - self.mask_training.cells
            stem = self.encode_image(pixel_values, input_ids[:, :until])

        def decode(ids: Tensor | None) -> Any:
            embeds = inputs_embeds
            if ids is not None:
                embeds = self.embed(ids, grid_ids, None if stem is None else stem.features)
            assert embeds is not None
            return self._decode(
                embeds,
                grid_ids,
                attention_mask,
                packed,
                past_key_values=past_key_values,
                position_ids=position_ids,
                use_cache=use_cache,
                **kwargs,
            )

        extra = self.mask_training
        if labels is not None and self.training and extra.inputs is not None:
            if input_ids is None:
                raise ValueError("input_ids must be given to replace mask tokens in training, got inputs_embeds")
            input_ids = extra.replace_inputs(self, input_ids, grid_ids, stem, decode)
        decoded = decode(input_ids)
        hidden = decoded.last_hidden_state
        losses: dict[str, Any] = {}
        if labels is not None:
            losses = self._loss(hidden, labels, het_position, het_token, num_items, loss_start)
            if extra.dense is not None:
                total, parts = extra.dense_losses(self, hidden, labels, grid_ids, stem, mask_pixels, num_images)
                losses |= {"loss": losses["loss"] + total, **parts}
        out = NTPSegOutput(
            **losses,
            last_hidden_state=hidden,
            cache=getattr(decoded, CACHE),
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
        )
        return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()

    def _decode(
        self,
        embeds: Tensor,
        grid_ids: Tensor | None,
        attention_mask: Tensor | None,
        packed: PackedRows | None,
        *,
        past_key_values: Any,
        position_ids: Tensor | None,
        use_cache: bool,
        **kwargs: Any,
    ) -> Any:
        """The backbone's output of ``[B, T, D]``, in that form also where it reads packed rows or shared sequences."""
        if packed is not None:
            embeds = packed.pack(embeds)
        attention = self.backbone.config
        fields: dict[str, Any] = {"attention_mask": attention_mask}
        if self.config.prefix_lm and past_key_values is None:
            wanted = embeds.shape[:2] if packed is None else packed.place.shape
            if grid_ids is None or grid_ids.shape != wanted:
                shape = None if grid_ids is None else list(grid_ids.shape)
                raise ValueError(f"grid_ids must be {list(wanted)}, as input_ids is, with prefix_lm, got {shape}")
            lengths = prompt_lengths(grid_ids, self.image_cells)
            fields = prefix_arguments(attention, embeds, attention_mask, lengths, packed)
        elif packed is not None:
            fields = packed_arguments(packed, attention._attn_implementation, None)
        fields = {"position_ids": position_ids, **kwargs, **fields}
        length, ranks = embeds.shape[1], self.sequence_group
        if ranks is not None:
            if packed is not None or attention_mask is not None or position_ids is not None or use_cache:
                raise ValueError(
                    "packing, attention_mask, position_ids and the cache must be left out with shared sequences, "
                    "got one"
                )
            embeds, place = ranks.split(embeds)
            fields |= sequence_arguments(ranks, place)
        decoded = self.backbone(inputs_embeds=embeds, use_cache=use_cache, **{CACHE: past_key_values}, **fields)
        if ranks is not None:
            decoded.last_hidden_state = ranks.gather(decoded.last_hidden_state, length)
        if packed is not None:
            decoded.last_hidden_state = packed.unpack(decoded.last_hidden_state)
            if decoded.hidden_states is not None:
                decoded.hidden_states = tuple(map(packed.unpack, decoded.hidden_states))
        return decoded

    def _loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        het_position: Tensor | None,
        het_token: Tensor | None,
        num_items: Any,
        start: int | None,
    ) -> dict[str, Tensor]:
        config = self.config
        if start is None:
            start = first_supervised(labels)
        # The k heads that predict the first supervised token stand at the k positions before it.
        start = max(0, start - config.num_heads_k)
        het = None
        if het_position is not None and het_token is not None and config.het_weight > 0:
            het = HardTokens(torch.where(het_position < start, -1, het_position - start), het_token)
        fields = self.heads(
            hidden[:, start:],
            labels[:, start:],
            negatives=config.negatives,
            tcl_weight=config.tcl_weight,
            het_weight=config.het_weight,
            temperature=config.temperature,
            head_weights=config.head_weights,
            vocab_range=None if config.vocab_range is None else tuple(config.vocab_range),
            het=het,
            num_items=num_items,
            share_classes=self.sequence_group,
        )
        out = NTPOutput(*fields)
        pad = nn.functional.pad
        return {
            "loss": out.loss,
            "ntp": out.ntp,
            "nktp": out.nktp,
            "tcl": out.tcl,
            "het": out.het,
            "prediction": pad(out.prediction, (start, 0), value=-1),
            "nll": pad(out.nll, (start, 0)),
            "margin": pad(out.margin, (start, 0)),
        }

    def next_token_logits(self, hidden: Tensor, vocab_range: tuple[int, int] | None = None) -> Tensor:
        """Head 0's logits ``[..., V]`` (or ``[..., hi - lo]``) of hidden states ``[..., D]``."""
        return self.heads(hidden, logits_of=1, vocab_range=vocab_range).squeeze(-2)


def first_supervised(labels: Tensor) -> int:
    """The first position of ``[B, T]`` `labels` that any row supervises; T if none does."""
    columns = (labels != -100).any(0).nonzero()
    return int(columns[0]) if len(columns) else labels.shape[1]


AutoConfig.register("ntpseg", NTPSegConfig, exist_ok=True)
AutoModel.register(NTPSegConfig, NTPSegModel, exist_ok=True)
