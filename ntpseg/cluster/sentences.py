"""The sentences of a data set: how many, and how many text tokens they have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ntpseg.training.config import RunConfig

# Of a sentence, where no data set says it; a stated assumption of plans and curves.
TEXT_TOKENS = 32


@dataclass(frozen=True)
class Sentences:
    """The training pairs of a data set.

    Attributes:
        pairs: how many; None where no data set is known.
        mean, longest: text tokens of a sentence.
    """

    pairs: int | None = None
    mean: float = TEXT_TOKENS
    longest: int = TEXT_TOKENS


def read_sentences(config: RunConfig, data: str | Path) -> Sentences:
    """Number and lengths of a data set's training pairs; no image is opened.

    Raises:
        ntpseg.data.DataProblems: the data set is not in order.
        FileNotFoundError, ValueError: it is none, or has no training pair.
    """
    from ntpseg.data import load_records
    from ntpseg.tokenizers.text import load_text_tokenizer, train_text_tokenizer

    records = load_records(data, config.data.layout, skip_bad=config.data.skip_bad)
    texts = [record.text for record in records if record.split == "train"]
    if not texts:
        raise ValueError(f"data must hold a pair of the training split, got none in {data}")
    if config.text.path is not None:
        tokenizer: Any = load_text_tokenizer(Path(config.text.path).expanduser())
    else:
        tokenizer = train_text_tokenizer(texts, max(config.text.vocab_size, 257))
    length = {text: len(tokenizer.encode(text, add_special_tokens=False)) for text in set(texts)}
    lengths = [length[text] for text in texts]
    return Sentences(len(texts), sum(lengths) / len(lengths), max(lengths))
