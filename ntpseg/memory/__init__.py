"""Hard error tokens (HET): what a model got wrong in the previous epoch, served back to the loss."""

from ntpseg.memory.deviation import Codebook as Codebook
from ntpseg.memory.deviation import token_deviation as token_deviation
from ntpseg.memory.memory import HardTokenMemory as HardTokenMemory
from ntpseg.memory.memory import HardTokens as HardTokens
from ntpseg.memory.storage import content_key as content_key

__all__ = ["Codebook", "HardTokenMemory", "HardTokens", "content_key", "token_deviation"]
