"""Text tokenizers: any Hugging Face directory, or a byte-level BPE of Qwen's kind trained on the captions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_END_OF_TEXT = "<|endoftext|>"
_ALPHABET = 256


def train_text_tokenizer(captions: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE with Qwen2's normaliser and pre-tokeniser; any text can be encoded, none is unknown.

    Args:
        captions: the training sentences; repeated ones count as often as they occur.
        vocab_size: largest number of ids, the 256 bytes and the end-of-text token included; few captions give fewer.

    Returns:
        A `Qwen2Tokenizer` with ``len(tokenizer)`` ids; ``save_pretrained`` writes Hugging Face's format.

    Raises:
        ValueError: `vocab_size` is below 257, or there is no caption.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    if vocab_size <= _ALPHABET:
        raise ValueError(f"vocab_size must be >= {_ALPHABET + 1} (256 bytes, end of text), got {vocab_size}")
    captions = [c for c in captions if c.strip()]
    if not captions:
        raise ValueError("captions must hold at least one sentence, got none")
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.decoder = decoders.ByteLevel()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    model = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],  # type: ignore[misc]  # its annotation is wrong
        eos_token=_END_OF_TEXT,
        pad_token=_END_OF_TEXT,
    )


def load_text_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """Load any Hugging Face tokenizer directory; nothing is downloaded.

    Raises:
        ValueError: the directory is missing or holds no tokenizer.
    """
    from transformers import AutoTokenizer

    path = Path(directory)
    if not path.is_dir():
        raise ValueError(f"text tokenizer directory must be a local directory, got {str(path)!r}, which does not exist")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            "text tokenizer directory must hold a Hugging Face tokenizer (tokenizer.json, or vocab.json with "
            f"merges.txt), got {str(path)!r}, which cannot be loaded ({' '.join(str(error).split())})"
        ) from error


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of `text` without special tokens: what `SequenceFormat.prompt` takes."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def text_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything that decides the ids: equal fingerprints give equal ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
