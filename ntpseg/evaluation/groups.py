"""What the cases of a split are grouped by in tables: the structure in their names, or the sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ntpseg.data import Record

_SUFFIX = re.compile(r"_([^\W\d_][^_]*)$")
MIN_CASES = 3


def group_cases(records: Sequence[Record]) -> tuple[str, list[str]]:
    """Choose the grouping.

    Where the table names the structure of every case, these are the groups.
    Data sets with several masks per image name the case after its structure (``cxr_0f89c850e9_left-lung``). Where
    all names end so and the endings repeat, they are the groups, whatever words the sentences use for them; otherwise
    equal sentences are.

    Args:
        records: the cases, N.

    Returns:
        ``"structure"`` or ``"sentence"``, and the group of each case, N.
    """
    structures = [record.place.structure if record.place else "" for record in records]
    if all(structures) and len(set(structures)) > 1:
        return "structure", structures
    suffixes = [match.group(1) if (match := _SUFFIX.search(r.case)) else "" for r in records]
    distinct = set(suffixes)
    if all(suffixes) and len(distinct) > 1 and len(suffixes) >= MIN_CASES * len(distinct):
        return "structure", suffixes
    return "sentence", [r.text for r in records]
