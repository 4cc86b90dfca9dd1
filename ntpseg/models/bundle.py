"""A trained segmenter in one directory: model, text tokenizer, vision tokenizer and sequence format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ntpseg.models.archive import unpack_bundle
from ntpseg.models.attention import attention_errors
from ntpseg.utils.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ntpseg.models.model import NTPSegModel
    from ntpseg.tokenizers.sequence import SequenceFormat
    from ntpseg.tokenizers.vision import VisionTokenizer


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
    """

    model: NTPSegModel
    text: PreTrainedTokenizerBase
    vision: VisionTokenizer
    sequence: SequenceFormat
    decoding: dict[str, Any] | None = None

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write ``config.json`` and ``model.safetensors``, and what `save_tokenizers` writes."""
        path = Path(directory)
        self.save_tokenizers(path)
        self.model.save_pretrained(path)
        return path

    def save_tokenizers(self, directory: str | Path) -> None:
        """Write ``text/``, ``vision/``, ``sequence.json`` and, if there is a choice, ``decoding.json`` alone.

        A sharded model is saved by its trainer.
        """
        path = Path(directory)
        self.text.save_pretrained(str(path / "text"))
        self.vision.save_pretrained(path / "vision")
        write_json(path / "sequence.json", self.sequence.to_dict())
        if self.decoding is not None:
            write_json(path / DECODING, self.decoding)

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
            attention: attention implementation; PyTorch's by default.
            device: where the model and the vision tokenizer go; the CPU by default.

        Raises:
            ValueError: no bundle there, or the attention implementation cannot be used.
        """
        from ntpseg.models.model import NTPSegModel
        from ntpseg.tokenizers.auto import load_vision_tokenizer
        from ntpseg.tokenizers.sequence import SequenceFormat
        from ntpseg.tokenizers.text import load_text_tokenizer

        path = bundle_directory(directory)
        sequence = SequenceFormat.from_dict(json.loads((path / "sequence.json").read_text(encoding="utf-8")))
        options: dict[str, Any] = {"dtype": dtype} if dtype is not None else {}
        with attention_errors(attention):
            model = NTPSegModel.from_pretrained(
                path, attn_implementation=attention, local_files_only=True, trust_remote_code=False, **options
            )
        vision = load_vision_tokenizer(path / "vision")
        if device is not None:
            model.to(device)  # type: ignore[arg-type]  # transformers hides the signature of `to`
            if isinstance(vision, torch.nn.Module):
                vision.to(device)
        model.eval()
        decoding = path / DECODING
        return cls(
            model=model,
            text=load_text_tokenizer(path / "text"),
            vision=vision,
            sequence=sequence,
            decoding=json.loads(decoding.read_text(encoding="utf-8")) if decoding.is_file() else None,
        )


def bundle_directory(directory: str | Path) -> Path:
    """The directory of the bundle that `directory` is or holds; an archive is unpacked.

    Raises:
        ValueError: neither it nor its ``model/`` is a complete bundle.
    """
    path = Path(directory)
    if path.is_file():
        path = unpack_bundle(path.resolve())
    for candidate in (path, path / "model"):
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
