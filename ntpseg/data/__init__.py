"""Loaders, checks and augmentation of referring segmentation data."""

from __future__ import annotations

from ntpseg.data.images import prepare, read_image, read_mask, resize_mask
from ntpseg.data.loading import load_records
from ntpseg.data.problems import DataProblems, Problem
from ntpseg.data.records import Record, case_of, subject_of

__all__ = [
    "DataProblems",
    "Problem",
    "Record",
    "case_of",
    "load_records",
    "prepare",
    "read_image",
    "read_mask",
    "resize_mask",
    "subject_of",
]
