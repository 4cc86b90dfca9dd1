"""Swapping left and right in a sentence, for an image that is mirrored."""

from __future__ import annotations

import re

LETTER = r"[^\W\d_]"
# The word itself and its compounds with a meaning of side; never a part of another word ("upright", "cleft").
SIDE_WORD = re.compile(
    rf"(?<!{LETTER})(left|right)(?=(?:s|side|sided|ward|wards|most|hand|handed)?(?!{LETTER}))", re.IGNORECASE
)
# QaTa-COV19's captions always name the left lung first: its grammar stays closed if the places change, not the words.
_PLACES = r"((?:(?:all|upper|middle|lower) )+)"
QATA_CLAUSE = re.compile(rf"(?<=, ){_PLACES}left lung and {_PLACES}right lung")


def swap_laterality(text: str) -> str:
    """Turn every "left" into "right" and the other way round, keeping capitals.

    Whole words and their compounds count ("left-sided", "rightmost", "LEFT"), parts of other words do not ("upright").
    Abbreviations (LUL, RLL) and other languages are not known: switch flips off for such captions. In the clause
    "A left lung and B right lung" of QaTa-COV19's grammar the places A and B change instead, which means the same.

    >>> swap_laterality("The upper lobe of the Left lung.")
    'The upper lobe of the Right lung.'
    >>> swap_laterality("Bilateral pulmonary infection, two infected areas, all left lung and lower right lung.")
    'Bilateral pulmonary infection, two infected areas, lower left lung and all right lung.'
    """
    clause = QATA_CLAUSE.search(text)
    if clause is None:
        return SIDE_WORD.sub(_other, text)
    swapped = f"{clause.group(2)}left lung and {clause.group(1)}right lung"
    return SIDE_WORD.sub(_other, text[: clause.start()]) + swapped + SIDE_WORD.sub(_other, text[clause.end() :])


def _other(match: re.Match[str]) -> str:
    word = match.group(1)
    other = "right" if word.lower() == "left" else "left"
    if word.isupper():
        return other.upper()
    return other.capitalize() if word[0].isupper() else other
