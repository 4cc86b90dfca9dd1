"""One YAML file describes a run; `key=value` pairs override it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONFIGS = Path(__file__).parent.parent / "configs"


@dataclass
class DataConfig:
    """The data set and what is done to it before tokenizing.

    Attributes:
        path: folder or manifest; must be given.
        layout: see `ntpseg.data.load_records`.
        size: side S of the square that images and masks are resized to, in pixels.
        channels: 1 (grey) or 3 (RGB).
        augment: fields of `ntpseg.data.Augmentation`; used when `variants` is not 0.
        variants: augmented variants per training pair, tokenized once; each epoch draws one of them or the original.
        mask_noise: at most this share of the mask tokens that the model reads in training is replaced by random mask
            codes, drawn per sequence from 0 to it. The labels stay. It makes the model look at the image instead of
            copying the last token, and to go on from its own errors; not of the paper. 0 switches it off.
        skip_bad: leave bad pairs out instead of refusing the data.
        cache: folder of the token cache; the run's own by default.
    """

    path: str | None = None
    layout: str = "auto"
    size: int = 128
    channels: int = 1
    augment: dict[str, Any] = field(default_factory=dict)
    variants: int = 0
    mask_noise: float = 0.0
    skip_bad: bool = False
    cache: str | None = None


@dataclass
class TextConfig:
    """The text tokenizer: any Hugging Face directory, or null to train one of `vocab_size` on the captions."""

    path: str | None = None
    vocab_size: int = 512


@dataclass
class ModelConfig:
    """The model.

    Attributes:
        preset: see `ntpseg.models.PRESETS`.
        k: how many next tokens each position predicts; 1 switches next-k-token prediction off.
        attention: Hugging Face's name (sdpa, eager, flash_attention_2, flash_attention_3); null: its default.
        grid_positions: learned two-dimensional position embeddings of the grid cells.
        codebook_embeddings: start the visual codes' embeddings from the vision tokenizer's codebooks.
        overrides: fields of the Hugging Face config that replace the preset's.
        weights: directory of a saved model to start from; null: random weights.
    """

    preset: str = "tiny"
    k: int = 4
    attention: str | None = None
    grid_positions: bool = True
    codebook_embeddings: bool = True
    overrides: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None


@dataclass
class LossConfig:
    """The loss, see `ntpseg.ntp_loss`; 0 switches the strategy off (`negatives` TCL, `hard_tokens` HET)."""

    negatives: int = 5
    tcl_weight: float = 1.0
    het_weight: float = 1.0
    hard_tokens: int = 8
    temperature: float = 1.0
    head_weights: list[float] | None = None


@dataclass
class RunConfig:
    """A whole run.

    Attributes:
        vision: ``path`` of a saved vision tokenizer, or null and the fields of `CompactVQOptions` to train one.
        training: any field of `transformers.TrainingArguments`; ``bf16`` may be "auto".
        output: the run's directory; must be given.
        seed: of everything random.
        layout: of the sequence, ntpseg or emu3 (Emu3's own, with which its weights can be used).
        max_minutes: end training after so many minutes, the learning rate falling with the clock; null: only steps
            and epochs count.
        deepspeed: zero1, zero2, zero3 or the path of a DeepSpeed JSON file.
    """

    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    vision: dict[str, Any] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training: dict[str, Any] = field(default_factory=dict)
    output: str | None = None
    seed: int = 0
    layout: str = "ntpseg"
    max_minutes: float | None = None
    deepspeed: str | None = None


# What a resumed run must share with the one it continues: anything else would not be the same training.
FIXED = ("data", "text", "vision", "model", "loss", "seed", "layout")


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
    for item in overrides:
        if "=" not in item:
            raise ValueError(f"override {item!r} must have the form key=value, such as model.k=1")
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(RunConfig), OmegaConf.load(path), OmegaConf.from_dotlist(overrides)
        )
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"configuration {path} with {overrides or 'no overrides'}: {reason}") from error
    assert isinstance(config, RunConfig)
    _check(config)
    return config


def _find(source: str | Path) -> Path:
    path = Path(source).expanduser()
    for candidate in (path, path / "config.yaml", CONFIGS / f"{source}.yaml"):
        if candidate.is_file():
            return candidate
    names = ", ".join(config_names())
    raise ValueError(f"configuration {str(source)!r} is not there; it must be a YAML file, a run, or one of {names}")


def config_names() -> list[str]:
    """The names of the ready configurations."""
    return sorted(p.stem for p in CONFIGS.glob("*.yaml"))


def _check(config: RunConfig) -> None:
    from transformers import TrainingArguments

    positive = {
        "data.size": config.data.size,
        "model.k": config.model.k,
        "text.vocab_size": config.text.vocab_size,
        "loss.temperature": config.loss.temperature,
    }
    for name, value in positive.items():
        if value <= 0:
            raise ValueError(f"{name} is {value}, it must be above 0")
    for name, value in {
        "data.variants": config.data.variants,
        "loss.negatives": config.loss.negatives,
        "loss.hard_tokens": config.loss.hard_tokens,
    }.items():
        if value < 0:
            raise ValueError(f"{name} is {value}, it must not be negative")
    if not 0 <= config.data.mask_noise <= 1:
        raise ValueError(f"data.mask_noise is {config.data.mask_noise}, it must be from 0 to 1")
    if config.max_minutes is not None and config.max_minutes <= 0:
        raise ValueError(f"max_minutes is {config.max_minutes}, it must be above 0")
    if config.data.channels not in (1, 3):
        raise ValueError(f"data.channels is {config.data.channels}, it must be 1 or 3")
    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    for name in config.training:
        if name not in known:
            raise ValueError(f"training.{name} is no field of transformers.TrainingArguments")
        if name in ("output_dir", "deepspeed", "seed", "data_seed"):
            own = {"output_dir": "output", "data_seed": "seed"}.get(name, name)
            raise ValueError(f"training.{name} must not be set, use {own}")


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML, readable by `load_config`."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def check_same_run(config: RunConfig, path: Path) -> None:
    """Refuse to continue a run under another configuration.

    Raises:
        ValueError: a section of `FIXED` differs from the configuration saved at `path`.
    """
    before, now = (_flat(OmegaConf.structured(c), FIXED) for c in (load_config(path), config))
    changed = [f"{k} ({before.get(k)!r} -> {now.get(k)!r})" for k in {**before, **now} if before.get(k) != now.get(k)]
    if changed:
        raise ValueError(f"resume: {', '.join(changed)} differ from {path}; start a new run for another configuration")


def _flat(config: DictConfig, sections: Iterable[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}", inner)
        else:
            found[prefix] = value

    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    for section in sections:
        walk(section, plain[section])
    return found
