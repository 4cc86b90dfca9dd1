"""Adapters to other people's code: how each is called, and why it cannot be where it cannot."""
