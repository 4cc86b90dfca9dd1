"""Loaders, checks and augmentation of referring segmentation data."""
