"""The truth of an evaluation: checked as that of a training, with cases without a finding kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ntpseg.data.checks import check_listing
from ntpseg.data.records import MaskOptions

if TYPE_CHECKING:
    from ntpseg.data import Record
    from ntpseg.data.layouts import Listing
    from ntpseg.data.problems import Problem


def truth_records(listing: Listing, records: Sequence[Record]) -> tuple[list[Record], list[Problem]]:
    """Open the files of some records of a data set.

    Args:
        listing: the data set.
        records: those of its records that will be evaluated.

    Returns:
        The records that can be scored, an empty mask among them: it is the truth of a case without a finding. And
        what is wrong with the data set's tables and with the files of the others.
    """
    wrong = check_listing(replace(listing, records=list(records)), MaskOptions(keep_empty=True)).problems
    named = {problem.name for problem in wrong}
    good = [
        record
        for record in records
        if not named & {listing.short(path) for path in (record.image, record.mask) if path is not None}
    ]
    return good, [*listing.problems, *wrong]
