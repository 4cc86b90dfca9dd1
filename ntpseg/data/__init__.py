"""Loaders, checks and augmentation of referring segmentation data."""

from __future__ import annotations

from ntpseg.data.augment import Augmentation
from ntpseg.data.images import prepare, read_image, read_mask, resize_mask
from ntpseg.data.loading import LAYOUTS, check_records, load_records, usable_records
from ntpseg.data.problems import DataProblems, Problem, problem_table
from ntpseg.data.records import Record, case_of, subject_of
from ntpseg.data.sides import swap_sides

__all__ = [
    "Augmentation",
    "DataProblems",
    "LAYOUTS",
    "Problem",
    "Record",
    "case_of",
    "check_records",
    "load_records",
    "prepare",
    "problem_table",
    "read_image",
    "read_mask",
    "resize_mask",
    "subject_of",
    "swap_sides",
    "usable_records",
]
