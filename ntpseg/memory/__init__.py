"""Hard error tokens (HET): what a model got wrong in the previous epoch, served back to the loss."""

from ntpseg.memory.deviation import Codebook as Codebook
from ntpseg.memory.deviation import token_deviation as token_deviation
from ntpseg.memory.exchange import Traffic as Traffic
from ntpseg.memory.key_index import KeyIndex as KeyIndex
from ntpseg.memory.key_index import build_index as build_index
from ntpseg.memory.key_index import renumber as renumber
from ntpseg.memory.key_index import sample_keys as sample_keys
from ntpseg.memory.memory import HardTokenMemory as HardTokenMemory
from ntpseg.memory.memory import HardTokens as HardTokens
from ntpseg.memory.storage import content_key as content_key

__all__ = [
    "Codebook",
    "HardTokenMemory",
    "HardTokens",
    "KeyIndex",
    "Traffic",
    "build_index",
    "content_key",
    "renumber",
    "sample_keys",
    "token_deviation",
]
