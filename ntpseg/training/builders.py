"""What a prepared run is trained with: the model and the data sets, by its configuration."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ntpseg.generation.options import DecodingOptions
from ntpseg.models.attention import attention_errors
from ntpseg.models.attention_choice import choose_attention
from ntpseg.models.bundle import load_whole
from ntpseg.models.mask_inputs import MaskInputOptions
from ntpseg.models.sharded_init import WeightShards, build_sharded, load_sharded
from ntpseg.tokenizers.pixel_cache import PixelSource
from ntpseg.training.attention import training_use
from ntpseg.training.config import ModelConfig, RunConfig
from ntpseg.training.dataset import Collator, EpochDataset, TokenDataset
from ntpseg.training.model_config import model_config, prompt_has_codes
from ntpseg.training.pixel_dataset import PixelCollator, PixelDataset
from ntpseg.training.preparation import Prepared, augmentation_of
from ntpseg.training.sharded_weights import partition_zero3, shards_of_run, without_zero_init
from ntpseg.utils.finite import check_finite
from ntpseg.utils.manifest import check_folder

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from ntpseg.models.attention_choice import AttentionChoice
    from ntpseg.models.config import NTPSegConfig
    from ntpseg.models.model import NTPSegModel


class Datasets(NamedTuple):
    """What the trainer reads.

    Attributes:
        training: the training split.
        validation: the validation split, as it is; None where there is none.
        collator: makes a batch of samples of either.
    """

    training: EpochDataset
    validation: EpochDataset | None
    collator: Any


def default_decoding(config: RunConfig) -> DecodingOptions:
    """How masks are decoded until validation has chosen: as in the paper, or in one pass where that was trained."""
    inputs = config.model.mask_inputs
    if inputs is not None and inputs.get("blank", MaskInputOptions.blank):
        return DecodingOptions(method="refine", passes=0)
    return DecodingOptions()


def make_datasets(config: RunConfig, prepared: Prepared) -> Datasets:
    """The data sets of a prepared run: pixels for the front ends that read them, else tokens."""
    made = _datasets(config, prepared)
    made.training.sampling = prepared.sampling
    return made


def _datasets(config: RunConfig, prepared: Prepared) -> Datasets:
    training, validation, sequence = prepared.training, prepared.validation, prepared.sequence
    if isinstance(training, PixelSource):
        augmentation = augmentation_of(config)
        assert validation is None or isinstance(validation, PixelSource)
        return Datasets(
            PixelDataset(training, augmentation, seed=config.seed),
            None if validation is None else PixelDataset(validation, seed=config.seed),
            PixelCollator(
                sequence,
                prepared.text,
                prepared.vision,
                image_tokens=prompt_has_codes(config),
                packing=config.data.packing,
            ),
        )
    assert not isinstance(validation, PixelSource)
    settings, loss = config.model, config.loss
    dense = loss.dice or loss.pixel or loss.soft
    cells = settings.grid_positions or settings.prefix_lm or settings.mask_inputs is not None or bool(dense)
    return Datasets(
        TokenDataset(training, sequence, seed=config.seed, mask_noise=config.data.mask_noise),
        None if validation is None else TokenDataset(validation, sequence, seed=config.seed, augmented=False),
        Collator(sequence, grid_ids=cells, packing=config.data.packing),
    )


def make_model(
    config: RunConfig,
    prepared: Prepared,
    choice: AttentionChoice | None = None,
    args: TrainingArguments | None = None,
) -> NTPSegModel:
    """A fresh model, or one that starts from ``model.weights``.

    Under ZeRO-3 and FSDP2 each rank draws or reads its shards alone. FSDP2's model has its weights when a trainer has
    taken it.

    Args:
        config, prepared: the run's.
        choice: its attention, see `run_attention`; chosen here by default.
        args: says whether ranks share the weights; without it each has all of them.

    Raises:
        ValueError: a setting of the model, the loss or the attention cannot be used.
    """
    settings, vision = config.model, prepared.vision
    made = model_config(config, prepared.sequence, vision)
    choice = choice or choose_attention(settings.attention, training_use(config, prepared))
    shards = shards_of_run(args)
    with attention_errors(settings.attention), nullcontext() if shards is None else without_zero_init():
        model = _construct(settings, made, choice.implementation, shards)
        # The tokenizer's at hand, which need not be the one that saved weights were trained with.
        assert model.readout is not None
        model.readout.set_patches(vision.mask_patches())
        if settings.weights is None and settings.codebook_embeddings:
            has_codes = prompt_has_codes(config) and vision.image_codes > 0
            model.init_visual_embeddings(vision.image_codebook() if has_codes else None, vision.mask_codebook())
        if settings.weights is None and settings.encoder_weights is not None and model.front_end is not None:
            encoder = model.front_end.stem.encoder
            with nullcontext() if shards is None else shards.whole(*encoder.modules()):
                model.front_end.load_encoder_weights(settings.encoder_weights)
    if shards is not None and shards.flat:
        partition_zero3(model)
    return model


def _construct(
    settings: ModelConfig, config: NTPSegConfig, attention: str | None, shards: WeightShards | None
) -> NTPSegModel:
    """The model of a configuration, with random weights or those of ``model.weights``.

    Raises:
        ValueError: ``model.weights`` is not a saved model, or not one with the weights of this configuration.
    """
    from ntpseg.models.model import NTPSegModel

    made = copy.deepcopy(config)
    made._attn_implementation = attention
    if settings.weights is None:
        return NTPSegModel(made) if shards is None else build_sharded(lambda: NTPSegModel(made), shards)
    path = Path(settings.weights).expanduser()
    if not (path / "config.json").is_file():
        raise ValueError(f"model.weights must be the directory of a saved model, got {str(path)!r}")
    check_folder("model.weights", path, "copy it again")
    optional = ("heads.", "grid.", "front_end.", "readout.")
    model: NTPSegModel
    if shards is None:
        model = load_whole(NTPSegModel, path, optional=optional, config=config, attn_implementation=attention)
    else:
        model = load_sharded(lambda: NTPSegModel(made), shards, path, optional=optional)
    check_finite(model, f"model.weights {path}")
    return model
