"""Hard error tokens (HET): what a model got wrong in the previous epoch, served back to the loss."""

from ntpseg.memory.memory import HardTokenMemory as HardTokenMemory
from ntpseg.memory.tokens import HardTokens as HardTokens

__all__ = ["HardTokenMemory", "HardTokens"]
