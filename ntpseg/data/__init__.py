"""Loaders, checks and augmentation of referring segmentation data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ntpseg.utils.lazy import lazy_exports

_EXPORTS = {
    "Augmentation": "ntpseg.data.augment",
    "DataProblems": "ntpseg.data.problems",
    "LAYOUTS": "ntpseg.data.layouts",
    "MaskOptions": "ntpseg.data.records",
    "Problem": "ntpseg.data.problems",
    "Record": "ntpseg.data.records",
    "SlicePlace": "ntpseg.data.records",
    "case_of": "ntpseg.data.records",
    "check_records": "ntpseg.data.loading",
    "inspect_dataset": "ntpseg.data.loading",
    "load_records": "ntpseg.data.loading",
    "prepare": "ntpseg.data.images",
    "problem_table": "ntpseg.data.problems",
    "read_image": "ntpseg.data.images",
    "read_mask": "ntpseg.data.masks",
    "read_truth": "ntpseg.data.masks",
    "read_windowed": "ntpseg.data.images",
    "resize_mask": "ntpseg.data.images",
    "resize_probability": "ntpseg.data.images",
    "subject_of": "ntpseg.data.records",
    "swap_laterality": "ntpseg.data.laterality",
    "usable_records": "ntpseg.data.loading",
    "write_png": "ntpseg.data.images",
}

__all__ = [
    "LAYOUTS",
    "Augmentation",
    "DataProblems",
    "MaskOptions",
    "Problem",
    "Record",
    "SlicePlace",
    "case_of",
    "check_records",
    "inspect_dataset",
    "load_records",
    "prepare",
    "problem_table",
    "read_image",
    "read_mask",
    "read_truth",
    "read_windowed",
    "resize_mask",
    "resize_probability",
    "subject_of",
    "swap_laterality",
    "usable_records",
    "write_png",
]

__getattr__ = lazy_exports(__name__, _EXPORTS)

if TYPE_CHECKING:
    from ntpseg.data.augment import Augmentation as Augmentation
    from ntpseg.data.images import prepare as prepare
    from ntpseg.data.images import read_image as read_image
    from ntpseg.data.images import read_windowed as read_windowed
    from ntpseg.data.images import resize_mask as resize_mask
    from ntpseg.data.images import resize_probability as resize_probability
    from ntpseg.data.images import write_png as write_png
    from ntpseg.data.laterality import swap_laterality as swap_laterality
    from ntpseg.data.layouts import LAYOUTS as LAYOUTS
    from ntpseg.data.loading import check_records as check_records
    from ntpseg.data.loading import inspect_dataset as inspect_dataset
    from ntpseg.data.loading import load_records as load_records
    from ntpseg.data.loading import usable_records as usable_records
    from ntpseg.data.masks import read_mask as read_mask
    from ntpseg.data.masks import read_truth as read_truth
    from ntpseg.data.problems import DataProblems as DataProblems
    from ntpseg.data.problems import Problem as Problem
    from ntpseg.data.problems import problem_table as problem_table
    from ntpseg.data.records import MaskOptions as MaskOptions
    from ntpseg.data.records import Record as Record
    from ntpseg.data.records import SlicePlace as SlicePlace
    from ntpseg.data.records import case_of as case_of
    from ntpseg.data.records import subject_of as subject_of
