"""From a directory to the vision tokenizer that is saved there."""

from __future__ import annotations

import json
from pathlib import Path

from ntpseg.tokenizers.compact import MODEL_TYPE, CompactVQ
from ntpseg.tokenizers.emu3 import Emu3Vision
from ntpseg.tokenizers.vision import VisionTokenizer
from ntpseg.utils.finite import check_finite

EMU3_MODEL_TYPE = "emu3_vqgan"


def load_vision_tokenizer(directory: str | Path, image_size: int | None = None) -> VisionTokenizer:
    """Load a vision tokenizer from a local directory: ours (`CompactVQ`) or Hugging Face's `Emu3VQVAE`.

    Args:
        directory: holds config.json and model.safetensors.
        image_size: side of the square input in pixels. A directory that this package wrote knows it; Emu3's own, which
            takes any size, needs it.

    Raises:
        ValueError: no such directory, an unknown kind of model, weights that are not finite, or an image size that is
            missing or contradicts it.
    """
    path = Path(directory)
    config = path / "config.json"
    if not config.is_file():
        raise ValueError(
            f"vision tokenizer directory must hold a saved tokenizer, got {str(path)!r}, which has no config.json"
        )
    try:
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{config} must be a model's configuration, got invalid JSON ({error})") from error
    if model_type == EMU3_MODEL_TYPE:
        emu3 = Emu3Vision.from_pretrained(path, image_size=image_size)
        check_finite(emu3.model, f"the vision tokenizer {path}")
        return emu3
    if model_type != MODEL_TYPE:
        raise ValueError(
            f"model_type of {config} must be {MODEL_TYPE!r} or {EMU3_MODEL_TYPE!r}, got {model_type!r} "
            "(a whole Emu3 model holds its Emu3VQVAE as `vqmodel`: save that one by itself)"
        )
    tokenizer = CompactVQ.from_pretrained(path)
    check_finite(tokenizer, f"the vision tokenizer {path}")
    if image_size is not None and image_size != tokenizer.image_size:
        raise ValueError(f"image_size must be {tokenizer.image_size}, as the tokenizer was trained, got {image_size}")
    return tokenizer
