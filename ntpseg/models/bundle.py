"""A trained segmenter in one directory: model, text tokenizer, vision tokenizer and sequence format."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from ntpseg.models.archive import unpack_bundle
from ntpseg.models.attention import AttentionUse, attention_errors
from ntpseg.models.attention_choice import choose_attention
from ntpseg.models.loading_report import check_report
from ntpseg.models.volume_input import VOLUME, VolumeInput
from ntpseg.utils.checks import one_line
from ntpseg.utils.files import write_json
from ntpseg.utils.finite import check_finite
from ntpseg.utils.manifest import MANIFEST, check_folder, write_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ntpseg.models.model import NTPSegModel
    from ntpseg.tokenizers.sequence import SequenceFormat
    from ntpseg.tokenizers.vision import VisionTokenizer
    from ntpseg.tokenizers.vocabulary import Vocabulary


DECODING = "decoding.json"


@dataclass
class Bundle:
    """Everything that turns an image and a sentence into a mask.

    Attributes:
        model: the decoder with its heads.
        text: Hugging Face tokenizer.
        vision: image and mask tokenizer.
        sequence: how both become one sequence; its vocabulary is the model's.
        decoding: fields of `DecodingOptions` that suit the model, as validation chose them; None: the defaults.
        volume: axis and window of the slices that the model was trained on, where these are known.
    """

    model: NTPSegModel
    text: PreTrainedTokenizerBase
    vision: VisionTokenizer
    sequence: SequenceFormat
    decoding: dict[str, Any] | None = None
    volume: VolumeInput = field(default_factory=VolumeInput)

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write ``config.json`` and ``model.safetensors``, what `save_tokenizers` writes, and the manifest of all."""
        path = Path(directory)
        self.save_tokenizers(path)
        self.model.save_pretrained(path)
        write_manifest(path)
        return path

    def save_tokenizers(self, directory: str | Path) -> None:
        """Write ``text/``, ``vision/``, ``sequence.json`` and, where they are known, ``decoding.json`` and
        ``volume.json`` alone.

        A sharded model is saved by its trainer.
        """
        path = Path(directory)
        self.text.save_pretrained(str(path / "text"))
        self.vision.save_pretrained(path / "vision")
        write_json(path / "sequence.json", self.sequence.to_dict())
        if self.decoding is not None:
            write_json(path / DECODING, self.decoding)
        self.volume.save(path)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        dtype: torch.dtype | str | None = None,
        attention: str | None = None,
        device: torch.device | str | None = None,
    ) -> Bundle:
        """Load a bundle from its directory, from the run directory that holds it in ``model/``, or from its archive.

        Args:
            directory: what `save_pretrained` wrote, a run of ``ntpseg train``, or a file of ``ntpseg pack``.
            dtype: of the weights; that in which they were saved by default.
            attention: one of `ATTENTION_NAMES`, or another that transformers knows; PyTorch's by default.
            device: where the model and the vision tokenizer go; the CPU by default.

        Raises:
            ValueError: no bundle there, a file of it that is damaged or lacks weights, weights that are not finite, or
                the attention implementation cannot be used.
        """
        from ntpseg.models.model import NTPSegModel
        from ntpseg.tokenizers.auto import load_vision_tokenizer
        from ntpseg.tokenizers.text import load_text_tokenizer

        path = bundle_directory(directory)
        sequence = _read_sequence(path / "sequence.json")
        options: dict[str, Any] = {"dtype": dtype} if dtype is not None else {}
        chosen = None
        if attention is not None:
            # One rank alone may load a model.
            chosen = choose_attention(attention, _use(path, sequence, dtype, device), agree=False).implementation
        with attention_errors(attention):
            model = load_whole(NTPSegModel, path, attn_implementation=chosen, **options)
        check_finite(model, f"the model {path}")
        vision, text = load_vision_tokenizer(path / "vision"), load_text_tokenizer(path / "text")
        _check_sizes(path, sequence.vocabulary, text, vision)
        if device is not None:
            model.to(device)  # type: ignore[arg-type]  # transformers hides the signature of `to`
            if isinstance(vision, torch.nn.Module):
                vision.to(device)
        model.eval()
        decoding, volume = path / DECODING, path / VOLUME
        return cls(
            model=model,
            text=text,
            vision=vision,
            sequence=sequence,
            decoding=_read_json(decoding) if decoding.is_file() else None,
            volume=VolumeInput.from_dict(_read_json(volume), volume) if volume.is_file() else VolumeInput(),
        )


def _use(
    path: Path, sequence: SequenceFormat, dtype: torch.dtype | str | None, device: torch.device | str | None
) -> AttentionUse:
    """What attention one image and its sentence take when a mask is decoded."""
    config = _read_json(path / "config.json")
    try:
        text = config["text_config"]
        heads = text["num_attention_heads"]
        kind = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype or config.get("dtype")), None)
        return AttentionUse(
            device=torch.device(device or "cpu"),
            dtype=kind if isinstance(kind, torch.dtype) else torch.float32,
            batch=1,
            heads=heads,
            length=sequence.grid_positions,
            width=text.get("head_dim") or text["hidden_size"] // heads,
            kv_heads=text.get("num_key_value_heads"),
            prefix=bool(config.get("prefix_lm")),
            training=False,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / 'config.json'} must be a model's, got a damaged file ({error!r})") from error


def bundle_directory(directory: str | Path) -> Path:
    """The directory of the bundle that `directory` is or holds; an archive is unpacked.

    Raises:
        ValueError: neither it nor its ``model/`` is a complete bundle.
    """
    path = Path(directory)
    if path.is_file():
        path = unpack_bundle(path.resolve())
    # A training that was killed while it replaced the model has left the whole new one under its first name.
    for candidate in (path, path / "model", path / "model.part"):
        has_manifest = (candidate / MANIFEST).is_file()
        if has_manifest and candidate.is_dir():
            check_folder("model", candidate, "copy it again, or save it again with `ntpseg train --resume`")
        # A training that was killed while it replaced the model has left the whole new one under its first name.
        if candidate.name == "model.part" and not has_manifest:
            continue
        if (candidate / "sequence.json").is_file() and (candidate / "config.json").is_file():
            return candidate
    raise ValueError(
        "model directory must be a run of `ntpseg train`, its model/ (config.json, model.safetensors, sequence.json, "
        f"text/, vision/) or a file of `ntpseg pack`, got {str(path)!r}, which holds no trained model"
    )


def bundle_files(directory: str | Path) -> list[Path]:
    """The files that loading `directory` would read, for commands that must not overwrite them."""
    path = Path(directory)
    folder = path / "model" if (path / "model").is_dir() else path
    return [path] if path.is_file() else [file for file in folder.rglob("*") if file.is_file()]


def load_whole(kind: Any, path: Path, *, optional: tuple[str, ...] = (), **options: Any) -> Any:
    """``kind.from_pretrained`` of a local directory, all weights its own: transformers fills gaps at random.

    Args:
        kind: a class of models.
        path: the directory.
        optional: beginnings of names of weights that may be missing or superfluous; a line on standard error names the
            first.
        **options: see ``from_pretrained``.

    Raises:
        ValueError: another weight is missing or superfluous, one has another shape, or a file cannot be read.
    """
    from transformers.utils import logging

    options = {"output_loading_info": True, "ignore_mismatched_sizes": True, **options}
    shown = logging.get_verbosity()
    # Its own report is a table; the error below names the first weight.
    logging.set_verbosity_error()
    try:
        model, report = kind.from_pretrained(path, local_files_only=True, trust_remote_code=False, **options)
    except (OSError, RuntimeError, SafetensorError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"model directory must hold a whole model, got {str(path)!r} ({one_line(error)})") from error
    finally:
        logging.set_verbosity(shown)
    check_report(path, report, optional)
    return model


def _check_sizes(path: Path, vocabulary: Vocabulary, text: PreTrainedTokenizerBase, vision: VisionTokenizer) -> None:
    """Raise a `ValueError` unless both tokenizers are those of the sequence format."""
    found = [("vision", "mask codes", vocabulary.mask_codes, vision.mask_codes)]
    if vocabulary.layout == "ntpseg":
        found.append(("text", "ids", vocabulary.text_size, len(text)))
    for name, unit, wanted, size in found:
        if size != wanted:
            raise ValueError(f"{path / name} must have {wanted} {unit}, as sequence.json says, got {size}")


def _read_sequence(path: Path) -> SequenceFormat:
    from ntpseg.tokenizers.sequence import SequenceFormat

    value = _read_json(path)
    try:
        return SequenceFormat.from_dict(value)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must be a sequence format, got a damaged file ({error!r})") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got a damaged file ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(value).__name__}")
    return value
