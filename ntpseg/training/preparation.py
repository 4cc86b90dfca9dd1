"""From a data set to tokens: check it, train or load the tokenizers, tokenize every pair once."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ntpseg.data import Augmentation, Record
from ntpseg.models.volume_input import VolumeInput
from ntpseg.tokenizers.auto import load_vision_tokenizer
from ntpseg.tokenizers.cache import TokenCache
from ntpseg.tokenizers.compact import CompactVQOptions
from ntpseg.tokenizers.compact_training import train_compact_vq
from ntpseg.tokenizers.packed import PackedTokens
from ntpseg.tokenizers.pixel_cache import PixelCache, PixelSource
from ntpseg.tokenizers.preprocess import stack_pairs
from ntpseg.tokenizers.sequence import SequenceFormat
from ntpseg.tokenizers.text import load_text_tokenizer, train_text_tokenizer
from ntpseg.tokenizers.vision import VisionTokenizer
from ntpseg.training.config import RunConfig
from ntpseg.training.folder_data import FolderData
from ntpseg.training.model_config import prompt_has_codes, sequence_format
from ntpseg.training.packed_data import PackedData, packed_of
from ntpseg.training.run_data import RunData
from ntpseg.training.same_data import write_data
from ntpseg.training.sampling import SamplingOptions, SliceSampling, read_sampling
from ntpseg.utils.files import write_json
from ntpseg.utils.manifest import check_folder, write_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ntpseg.volumes import Axis

PREPARED = "prepared.json"
# What training reads pairs from.
Source = TokenCache | PackedTokens | PixelSource


@dataclass(frozen=True)
class Prepared:
    """What training reads.

    Attributes:
        text: the text tokenizer.
        vision: the vision tokenizer.
        sequence: the format of sequences.
        training: the training split: tokens or, for front ends that read pixels, pixels; of a packed data set those
            that are in it, as far as they fit.
        validation: the validation split; None where the data set has none.
        sampling: which training pairs an epoch visits; None: all.
        volume: axis and window of the training split's slices, see `volume_input`.
    """

    text: PreTrainedTokenizerBase
    vision: VisionTokenizer
    sequence: SequenceFormat
    training: Source
    validation: Source | None
    sampling: SliceSampling | None = None
    volume: VolumeInput = field(default_factory=VolumeInput)


def prepare_run(config: RunConfig, run: Path, *, progress: bool = True) -> Prepared:
    """Prepare a run, or open what an earlier call prepared in `run`; a damaged cache is built again.

    Tokenizers go to ``run/tokenizers``, tokens to ``run/cache`` (or ``data.cache``). A packed data set was checked when
    it was packed: pixels, and the tokens that it was packed with, are read from it as training goes.

    Raises:
        DataProblems: the data set is not in order and ``data.skip_bad`` is False.
        ValueError: it has no training pair, or a setting cannot be used.
    """
    done = run / PREPARED
    if done.is_file():
        return _open(config, run, _read_keys(done), progress)
    write_data(config, run)
    data = _data(config, run)
    data.check()
    training, validation = data.pairs("train"), data.pairs("val")
    if not training:
        raise ValueError(f"data.path must hold a pair of the training split, got none in {config.data.path!r}")
    text, vision = data.tokenizers()
    augmentation = augmentation_of(config)
    text = _text(config, data) if text is None else text
    text.save_pretrained(str(run / "tokenizers" / "text"))
    vision = _vision(config, training, augmentation, progress) if vision is None else vision
    vision.save_pretrained(run / "tokenizers" / "vision")
    first = _source(config, run, "train", data, vision, text, progress)
    second = _source(config, run, "val", data, vision, text, progress) if validation else None
    sequence = sequence_format(config, vision, text)
    write_manifest(run / "tokenizers")
    volume = volume_input(data.views())
    keys = {
        "training": first.key,
        "validation": None if second is None else second.key,
        "sequence": sequence.to_dict(),
        "pairs": {"training": len(training), "validation": len(validation)},
        "volume": dataclasses.asdict(volume),
    }
    if sampling_of(config):
        data.write_sampling(run)
    sampling = _sampling(config, run, len(training))
    if sampling is not None and progress:
        print(sampling, file=sys.stderr)
    write_json(done, keys)
    return Prepared(text, vision, sequence, first, second, sampling, volume)


def _data(config: RunConfig, run: Path, *, again: bool = False) -> RunData:
    packed = packed_of(config)
    return FolderData(config, run, again=again) if packed is None else PackedData(config, packed)


def _source(
    config: RunConfig,
    run: Path,
    split: str,
    data: RunData,
    vision: VisionTokenizer,
    text: PreTrainedTokenizerBase,
    progress: bool,
) -> Source:
    """Where a split is read from; a cache is built, or opened where it holds exactly this."""
    found = data.streamed(split, vision, text)
    if found is not None:
        return found
    folder, records, training = _cache_folder(config, run), data.pairs(split), split == "train"
    if config.model.front_end != "codes":
        return PixelCache.build(folder, records, config.data.size, config.data.channels, progress=progress)
    return TokenCache.build(
        folder,
        records,
        vision,
        text,
        variants=config.data.variants if training else 0,
        augmentation=augmentation_of(config) if training else None,
        seed=config.seed,
        progress=progress,
    )


def sampling_of(config: RunConfig) -> SamplingOptions:
    """How the epochs of a run choose among its training pairs."""
    return SamplingOptions(config.data.empty_share, config.data.pairs_per_volume)


def _sampling(config: RunConfig, run: Path, pairs: int) -> SliceSampling | None:
    options = sampling_of(config)
    return read_sampling(run, pairs, options) if options else None


def volume_input(views: Iterable[tuple[str, str]]) -> VolumeInput:
    """The axis and the window that all pairs share; what differs, or is "" (unknown) of one, is None."""
    axes, windows = (set(values) for values in zip(*((axis or None, window or None) for axis, window in views)))
    axis = cast("Axis | None", axes.pop() if len(axes) == 1 else None)
    return VolumeInput(axis, windows.pop() if len(windows) == 1 else None)


def _read_keys(path: Path) -> dict[str, Any]:
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
        found = {name: keys[name] for name in ("training", "validation", "sequence", "pairs")}
        # Runs of earlier versions remember none.
        return {**found, "volume": VolumeInput.from_dict(keys.get("volume") or {}, path)}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} must say what was prepared, got a damaged file ({error!r}); start again with --overwrite"
        ) from error


def _open(config: RunConfig, run: Path, keys: dict[str, Any], progress: bool) -> Prepared:
    check_folder("tokenizers", run / "tokenizers", "start again with --overwrite")
    text = load_text_tokenizer(run / "tokenizers" / "text")
    vision = load_vision_tokenizer(run / "tokenizers" / "vision")
    folder = _cache_folder(config, run)
    data = _data(config, run, again=True)

    def cache(split: str, key: str) -> Source:
        found: Source | None = data.streamed(split, vision, text)
        if found is None:
            kind = TokenCache if config.model.front_end == "codes" else PixelCache
            try:
                return kind.open(folder, key)
            except ValueError:
                if not (folder / key).is_dir():
                    print(f"building the cache {folder / key} again: it is gone", file=sys.stderr)
            found = _source(config, run, split, data, vision, text, progress)
        if found.key != key:
            raise ValueError(
                f"the cache {key} of the run must be built from the data that it was made of, got other data in "
                f"{config.data.path}; put it back, or start again with --overwrite"
            )
        return found

    first, second = cache("train", keys["training"]), keys["validation"]
    return Prepared(
        text=text,
        vision=vision,
        sequence=SequenceFormat.from_dict(keys["sequence"]),
        training=first,
        validation=None if second is None else cache("val", second),
        sampling=_sampling(config, run, len(first)),
        volume=keys["volume"],
    )


def _cache_folder(config: RunConfig, run: Path) -> Path:
    return run / "cache" if config.data.cache is None else Path(config.data.cache).expanduser()


def augmentation_of(config: RunConfig) -> Augmentation | None:
    """The augmentation of a run; None where there is none.

    Raises:
        ValueError: a field that `Augmentation` does not have, or a value that it refuses.
    """
    try:
        augmentation = Augmentation(**config.data.augment)
    except (TypeError, ValueError) as error:
        raise ValueError(f"data.augment must be fields of Augmentation, got: {error}") from error
    augmented = config.data.variants if config.model.front_end == "codes" else config.data.augment
    return augmentation if augmented else None


def _text(config: RunConfig, data: RunData) -> PreTrainedTokenizerBase:
    if config.text.path is not None:
        return load_text_tokenizer(Path(config.text.path).expanduser())
    return train_text_tokenizer(list(data.texts()), config.text.vocab_size)


def _vision(
    config: RunConfig, training: Sequence[Record], augmentation: Augmentation | None, progress: bool
) -> VisionTokenizer:
    fields = dict(config.vision)
    path = fields.pop("path", None)
    size, channels = config.data.size, config.data.channels
    if path is not None:
        vision = load_vision_tokenizer(Path(path).expanduser(), image_size=size)
        if vision.channels != channels:
            raise ValueError(f"data.channels must be {vision.channels} for the vision tokenizer {path}, got {channels}")
        return vision
    if not prompt_has_codes(config):
        # No image is tokenised, so no image codebook is trained.
        fields["image_codes"] = 0
    try:
        options = CompactVQOptions(**{"seed": config.seed, **fields})
    except (TypeError, ValueError) as error:
        raise ValueError(f"vision must be fields of CompactVQOptions, or path, got: {error}") from error
    # A codebook that will encode augmented images has to have seen some.
    copies = 1 if augmentation is not None else 0
    images, masks = stack_pairs(
        training,
        size,
        channels,
        limit=max(1, options.max_images // (1 + copies)),
        variants=copies,
        augmentation=augmentation,
        seed=config.seed,
        progress=progress,
    )
    return train_compact_vq(images, masks, options, progress=progress)
