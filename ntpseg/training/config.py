"""One YAML file describes a run; `key=value` pairs override it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ntpseg.data.shards.storage import dataset_url
from ntpseg.models.stem import FRONT_ENDS
from ntpseg.tokenizers.vocabulary import SEQUENCE_LAYOUTS
from ntpseg.training.config_checks import check_sections
from ntpseg.training.config_file import check_interpolations, conceal, parse_overrides, read_yaml, reason, short
from ntpseg.utils.checks import check_choice, check_integer, check_number

CONFIGS = Path(__file__).parent.parent / "configs"
OPTIMIZERS = ("adamw", "muon")
CLOCKS = ("wall", "cpu")
HARD_TOKEN_STORAGES = ("device", "pinned", "mapped")
# What a resumed run may do otherwise: errors come from the checkpoint, and are the same wherever they lie.
_MAY_CHANGE = ("loss.hard_token_storage", "loss.hard_token_path", "loss.hard_token_sync_steps")
# Keys that are saved as absolute paths; of those after the first three only what exists, the others may be names.
_PATHS = (
    "output",
    "data.path",
    "data.cache",
    "text.path",
    "vision.path",
    "model.encoder_weights",
    "model.weights",
    "deepspeed",
)
# The attribute of a loaded configuration that says which of its values were interpolations; no field, so never saved.
_INTERPOLATED = "_interpolated"


@dataclass
class DataConfig:
    """The data set and what is done to it before tokenizing.

    Attributes:
        path: folder or manifest, or the URL of a packed data set (`ntpseg data pack`); must be given.
        layout: see `ntpseg.data.load_records`.
        size: side S of the square that images and masks are resized to, in pixels.
        channels: 1 (grey) or 3 (RGB).
        augment: fields of `ntpseg.data.Augmentation`. With the front end ``codes`` used when `variants` is not 0; with
            the others every epoch augments anew, and no field given means no augmentation.
        variants: augmented variants per training pair, tokenized once; each epoch draws one of them or the original.
            Only with the front end ``codes``.
        mask_noise: at most this fraction of the mask tokens that the model reads in training is replaced by random mask
            codes, drawn per sequence from 0 to it. The labels stay. It makes the model read the image instead of
            copying the last token, and continue after its own errors; not in the paper. 0 switches it off. With
            ``model.mask_inputs`` it must be 0.
        skip_bad: leave bad pairs out instead of refusing the data.
        keep_empty: keep cases without a finding (empty masks) in training and evaluation instead of refusing them.
        empty_share: at most this share of a training epoch's pairs has no foreground; each epoch takes others of them.
            Only with `keep_empty`. null: all of them in every epoch.
        pairs_per_volume: at most so many pairs of a volume in a training epoch, each epoch others; with a number that
            all volumes have, all count alike. null: all pairs.
        mask_value: class of label maps whose table names none, see `ntpseg.data.MaskOptions`; null: masks hold one.
        cache: folder of the token cache; the run's own by default.
        packing: the decoder reads the sequences of a batch end to end in rows of at most so many tokens (of the longest
            sequence's where that is longer) instead of the padding behind them, wherever that saves 5 % of the tokens;
            loss and gradient stay those of the batch. Pays where sentences differ much in length. null: off.
    """

    path: str | None = None
    layout: str = "auto"
    size: int = 128
    channels: int = 1
    augment: dict[str, Any] = field(default_factory=dict)
    variants: int = 0
    mask_noise: float = 0.0
    skip_bad: bool = False
    keep_empty: bool = False
    empty_share: float | None = None
    pairs_per_volume: int | None = None
    mask_value: str | None = None
    cache: str | None = None
    packing: int | None = None


@dataclass
class TextConfig:
    """The text tokenizer.

    Attributes:
        path: any Hugging Face directory; null trains one on the captions.
        vocab_size: most ids of the one that is trained.
    """

    path: str | None = None
    vocab_size: int = 512


@dataclass
class ModelConfig:
    """The model.

    Attributes:
        preset: see `ntpseg.models.PRESETS`.
        k: how many next tokens each position predicts; 1 switches next-k-token prediction off.
        attention: flash, xformers, sdpa, eager, causal_blocks, flex or another of Hugging Face's names; auto: the
            quickest of them here, measured once and kept in the run's attention.json; null: causal_blocks on a CPU,
            Hugging Face's default elsewhere.
        front_end: how the image is read: codes (tokens, the paper's), features (of a convolutional stem or a pretrained
            encoder), or both.
        stem: fields of `ntpseg.models.stem.StemOptions`, for the front ends features and both.
        encoder_weights: file or directory of a pretrained encoder's weights, see `PretrainedEncoder.load_weights`.
        mask_inputs: fields of `ntpseg.models.mask_inputs.MaskInputOptions`: drafts, noise and blanks in place of the
            mask tokens that are read in training; null: the true ones.
        prefix_lm: the prompt's tokens see each other in both directions.
        grid_positions: learned two-dimensional position embeddings of the grid cells.
        codebook_embeddings: start the visual codes' embeddings from the vision tokenizer's codebooks.
        overrides: fields of the Hugging Face config that replace the preset's.
        weights: directory of a saved model to start from; null: random weights.
    """

    preset: str = "tiny"
    k: int = 4
    attention: str | None = None
    front_end: str = "codes"
    stem: dict[str, Any] = field(default_factory=dict)
    encoder_weights: str | None = None
    mask_inputs: dict[str, Any] | None = None
    prefix_lm: bool = False
    grid_positions: bool = True
    codebook_embeddings: bool = True
    overrides: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None


@dataclass
class LossConfig:
    """The loss, see `ntpseg.ntp_loss` and `ntpseg.losses.dense`.

    Attributes:
        negatives: of TCL; 0 switches it off.
        tcl_weight, het_weight: weights of TCL and HET.
        hard_tokens: hard error tokens that each sample keeps; 0 switches HET off.
        hard_token_storage: where they lie: on the device, pinned (host memory) or mapped (files), see
            `ntpseg.HardTokenMemory`. This and the next two may change when a run is resumed.
        hard_token_path: folder for those that are mapped, best on a disk of the node; null: in the run's directory.
        hard_token_sync_steps: ranks send each other what they recorded every so many steps, beside the steps; 0: only
            at the end of an epoch.
        temperature: of TCL and HET.
        head_weights: weight of each head; null: all 1.
        dice, pixel, soft, soft_temperature: see `DenseLossOptions`; all off by default.
    """

    negatives: int = 5
    tcl_weight: float = 1.0
    het_weight: float = 1.0
    hard_tokens: int = 8
    hard_token_storage: str = "device"
    hard_token_path: str | None = None
    hard_token_sync_steps: int = 50
    temperature: float = 1.0
    head_weights: list[float] | None = None
    dice: float = 0.0
    pixel: float = 0.0
    soft: float = 0.0
    soft_temperature: float = 4.0


@dataclass
class OptimizerConfig:
    """The optimizer; learning rate, betas and weight decay of AdamW are fields of ``training``.

    Attributes:
        name: adamw, or muon: `Muon` for the matrices and convolutions inside the model, AdamW for all else.
        muon_learning_rate: of the matrices, at its peak.
        muon_momentum: of the matrices.
        ema: decay of the moving average of the weights that is evaluated and saved; 0: there is none.
    """

    name: str = "adamw"
    muon_learning_rate: float = 0.02
    muon_momentum: float = 0.95
    ema: float = 0.0


@dataclass
class RunConfig:
    """A whole run.

    Attributes:
        data, text, model, loss: see their classes.
        vision: ``path`` of a saved vision tokenizer, or null and the fields of `CompactVQOptions` to train one.
        training: any field of `transformers.TrainingArguments`; ``bf16`` may be "auto". Besides them
            ``profile_steps``: so many steps are profiled, see docs/profiling.md; ``hang_timeout``: seconds after
            which ranks that get no further end with exit code 75, see docs/cluster.md; by default 1800 with several
            ranks, 0: never; and ``sequence_parallel_size``: so many ranks share each sequence and the classes of the
            loss, see docs/cluster.md.
        output: the run's directory; must be given.
        seed: of everything random.
        layout: of the sequence, ntpseg or emu3 (Emu3's own, with which its weights can be used).
        max_minutes: end training after so many minutes, the learning rate falling with the clock; null: only steps
            and epochs count.
        max_skipped_steps: end training, without a model, after so many steps in a row whose loss or gradient was not
            finite (or that supervised no label); each of them is skipped and reported.
        clock: of max_minutes: wall, or cpu, the processor time of the training steps alone (of this process: with
            loader workers their time is not counted).
        deepspeed: zero1, zero2, zero3, zero2_offload, zero3_offload or the path of a DeepSpeed JSON file.
    """

    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    vision: dict[str, Any] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: dict[str, Any] = field(default_factory=dict)
    output: str | None = None
    seed: int = 0
    layout: str = "ntpseg"
    max_minutes: float | None = None
    clock: str = "wall"
    max_skipped_steps: int = 5
    deepspeed: str | None = None


# What a resumed run must have in common with the one it continues, or it would not be the same training.
RESUME_SECTIONS = ("data", "text", "vision", "model", "loss", "optimizer", "seed", "layout")


def load_config(source: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a configuration.

    Args:
        source: name of a file of ``ntpseg/configs`` without ``.yaml``, the path of a YAML file, or a run's directory.
        overrides: ``section.key=value``.

    Raises:
        ValueError: no such configuration, an unknown key, or a value of the wrong kind.
    """
    path = _find(source)
    overrides = list(overrides)
    parts = [read_yaml(path), parse_overrides(overrides)]
    values: dict[str, tuple[str, Any]] = {}
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), *parts)
        values = check_interpolations(merged)
        config = OmegaConf.to_object(merged)
    except Exception as error:  # OmegaConf's own, and what its conversions raise on values of any kind
        described = f"{path} with {', '.join(map(short, overrides)) or 'no overrides'}"
        raise ValueError(
            f"configuration must have known keys and valid values, got {described}: {conceal(reason(error), values)}"
        ) from (None if values else error)
    assert isinstance(config, RunConfig)
    try:
        _check(config)
    except ValueError as error:
        raise ValueError(conceal(str(error), values)) from (None if values else error)
    vars(config)[_INTERPOLATED] = values
    return config


def _find(source: str | Path) -> Path:
    try:
        path = Path(source).expanduser()
        for candidate in (path, path / "config.yaml", CONFIGS / f"{source}.yaml"):
            if candidate.is_file():
                return candidate
    except (OSError, RuntimeError, ValueError):
        pass  # a name that no file can have
    names = ", ".join(config_names())
    raise ValueError(f"configuration must be a YAML file, a run, or one of {names}, got {short(str(source))}")


def config_names() -> list[str]:
    """The names of the ready configurations."""
    return sorted(p.stem for p in CONFIGS.glob("*.yaml"))


def _check(config: RunConfig) -> None:
    check_integer("data.size", config.data.size, 1)
    check_integer("data.variants", config.data.variants, 0)
    check_choice("data.channels", config.data.channels, (1, 3))
    check_number("data.mask_noise", config.data.mask_noise, 0, 1)
    check_integer("text.vocab_size", config.text.vocab_size, 1)
    check_integer("model.k", config.model.k, 1)
    check_integer("loss.negatives", config.loss.negatives, 0)
    check_integer("loss.hard_tokens", config.loss.hard_tokens, 0)
    check_integer("loss.hard_token_sync_steps", config.loss.hard_token_sync_steps, 0)
    check_choice("loss.hard_token_storage", config.loss.hard_token_storage, HARD_TOKEN_STORAGES)
    if config.loss.hard_token_path is not None and config.loss.hard_token_storage != "mapped":
        raise ValueError(
            f"loss.hard_token_path must be null unless loss.hard_token_storage is mapped, got "
            f"{config.loss.hard_token_path!r}"
        )
    check_number("loss.temperature", config.loss.temperature, above=0)
    if config.max_minutes is not None:
        check_number("max_minutes", config.max_minutes, above=0)
    check_choice("clock", config.clock, CLOCKS)
    check_integer("max_skipped_steps", config.max_skipped_steps, 1)
    check_choice("optimizer.name", config.optimizer.name, OPTIMIZERS)
    check_number("optimizer.muon_learning_rate", config.optimizer.muon_learning_rate, above=0)
    check_number("optimizer.muon_momentum", config.optimizer.muon_momentum, 0, below=1)
    check_number("optimizer.ema", config.optimizer.ema, 0, below=1)
    if config.optimizer.name == "muon" and config.deepspeed is not None:
        raise ValueError(f"optimizer.name must be adamw with deepspeed, which flattens the matrices, got {'muon'!r}")
    check_choice("model.front_end", config.model.front_end, FRONT_ENDS)
    if config.model.front_end != "codes" and config.layout != "ntpseg":
        raise ValueError(f"layout must be ntpseg with front_end {config.model.front_end!r}, got {config.layout!r}")
    if config.model.front_end != "codes" and config.data.variants:
        raise ValueError(
            f"data.variants must be 0 with front_end {config.model.front_end!r}, which augments as it trains, "
            f"got {config.data.variants}"
        )
    if config.model.mask_inputs is not None and config.data.mask_noise:
        raise ValueError(f"data.mask_noise must be 0 with model.mask_inputs, got {config.data.mask_noise}")
    check_choice("layout", config.layout, SEQUENCE_LAYOUTS)
    check_sections(config)


def dump_config(config: RunConfig, *, resolve: bool = False) -> str:
    """The configuration as YAML, readable by `load_config` from any working directory: paths are absolute.

    Args:
        config: see `load_config`.
        resolve: write what interpolations such as ``${oc.env:TOKEN}`` gave; by default their own text is written.
    """
    plain = _structured(config)
    if not resolve:
        current = OmegaConf.structured(config)
        for key, (raw, value) in vars(config).get(_INTERPOLATED, {}).items():
            if OmegaConf.select(current, key) == value:
                OmegaConf.update(plain, key, raw)
    return OmegaConf.to_yaml(plain)


def _structured(config: RunConfig) -> DictConfig:
    """The configuration with absolute paths."""
    plain = OmegaConf.structured(config)
    for key in _PATHS:
        value = OmegaConf.select(plain, key)
        if value is not None and (key != "data.path" or dataset_url(value) is None):
            path = Path(value).expanduser().absolute()
            if key in _PATHS[:3] or path.exists():
                OmegaConf.update(plain, key, str(path))
    return plain


def check_same_run(config: RunConfig, path: Path) -> None:
    """Refuse to continue a run under another configuration.

    Raises:
        ValueError: a section of `RESUME_SECTIONS` differs from the configuration saved at `path`.
    """
    saved = load_config(path)
    before, now = (_flat(_structured(c), RESUME_SECTIONS) for c in (saved, config))
    keys = [key for key in {**before, **now} if key not in _MAY_CHANGE]
    changed = [f"{k} ({before.get(k)!r} -> {now.get(k)!r})" for k in keys if before.get(k) != now.get(k)]
    if changed:
        message = f"resume must continue the configuration of {path}, got {', '.join(changed)}"
        for known in (saved, config):
            message = conceal(message, vars(known).get(_INTERPOLATED, {}))
        raise ValueError(message)


def _flat(config: DictConfig, sections: Iterable[str]) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}", inner)
        else:
            flat[prefix] = value

    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    for section in sections:
        walk(section, plain[section])
    return flat
