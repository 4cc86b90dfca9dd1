"""The causal decoder, its k heads and the saved bundle."""
