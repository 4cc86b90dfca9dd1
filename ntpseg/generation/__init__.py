"""Decoding masks and predicting files."""
