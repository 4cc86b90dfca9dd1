"""What the cases of a split are grouped by in tables: the structure that their names tell, or the sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ntpseg.data import Record

_TAIL = re.compile(r"_([^\W\d_][^_]*)$")
LEAST_CASES = 3


def group_cases(records: Sequence[Record]) -> tuple[str, list[str]]:
    """Choose the grouping.

    Data sets with several masks per image name the case after its structure (``cxr_0f89c850e9_left-lung``). Where
    all names end so and the endings repeat, they are the groups, whatever words the sentences use for them; otherwise
    equal sentences are.

    Args:
        records: the cases, N.

    Returns:
        ``"structure"`` or ``"sentence"``, and the group of each case, N.
    """
    tails = [match.group(1) if (match := _TAIL.search(r.case)) else "" for r in records]
    distinct = set(tails)
    if all(tails) and len(distinct) > 1 and len(tails) >= LEAST_CASES * len(distinct):
        return "structure", tails
    return "sentence", [r.text for r in records]
