"""What the facts of all ranks say together: what must be mended before a run, and what is worth a look."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ntpseg.cluster.facts import RankFacts

MAX_CLOCK_SKEW = 1.0  # seconds: beyond it, files and logs of different machines tell another order than happened
SLOW = 0.8  # share of the median speed below which a rank holds up all others
_LITTLE_DISK = 2 << 30


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        text: what it is, which ranks, what to do.
        fatal: whether a run would fail, or train on something else than the other ranks.
    """

    text: str
    fatal: bool


def find(facts: Sequence[RankFacts], skew: Sequence[float]) -> list[Finding]:
    """All findings, the fatal ones first.

    Args:
        facts: of every rank, by rank.
        skew: seconds that each rank's clock is ahead of rank 0's.
    """
    found = []
    names = sorted({name for each in facts for name in each.versions})
    for name in names:
        values = [each.versions.get(name, "none") for each in facts]
        found += _differs(name, values, facts, "install the same version everywhere")
    found += _differs(
        "the code of ntpseg", [each.code for each in facts], facts, "install the same checkout everywhere"
    )
    found += _differs("the data set", [each.data for each in facts], facts, "copy it again, or name a shared folder")
    found += _differs("the device", [each.device for each in facts], facts, "the slowest sets the pace", fatal=False)
    late = [each.rank for each, ahead in zip(facts, skew, strict=True) if abs(ahead) > MAX_CLOCK_SKEW]
    if late:
        worst = max(skew, key=abs)
        text = f"clocks must agree within {MAX_CLOCK_SKEW:.0f} s, got {worst:+.1f} s on {_ranks(late, facts)}"
        found.append(Finding(f"{text}; start a time service (chrony, systemd-timesyncd)", fatal=False))
    median = statistics.median(each.flops for each in facts)
    for each in facts:
        if each.flops < SLOW * median:
            share = f"{each.flops / median:.0%} of the median speed"
            found.append(
                Finding(f"{_ranks([each.rank], facts)} multiplies at {share}: throttled, or shared?", fatal=False)
            )
        if each.free_disk < _LITTLE_DISK:
            free = f"{each.free_disk / 2**30:.1f} GiB free on the disk of the output"
            found.append(Finding(f"{_ranks([each.rank], facts)} has {free}: checkpoints may not fit", fatal=False))
    return sorted(found, key=lambda finding: not finding.fatal)


def _differs(
    what: str, values: Sequence[str], facts: Sequence[RankFacts], cure: str, *, fatal: bool = True
) -> list[Finding]:
    if len(set(values)) <= 1:
        return []
    parts = []
    for value, _ in Counter(values).most_common():
        ranks = [each.rank for each, own in zip(facts, values, strict=True) if own == value]
        parts.append(f"{value} on {_ranks(ranks, facts)}")
    return [Finding(f"{what} must be the same on all ranks, got {', '.join(parts)}; {cure}", fatal)]


def _ranks(ranks: Sequence[int], facts: Sequence[RankFacts]) -> str:
    """``ranks 0-2, 5 (a, b)``, with the hosts."""
    hosts = sorted({facts[rank].host for rank in ranks})
    shown = ", ".join(hosts[:3]) + (f" and {len(hosts) - 3} more" if len(hosts) > 3 else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {ranges(ranks)} ({shown})"


def ranges(numbers: Sequence[int]) -> str:
    """``0-2, 5`` of 0, 1, 2, 5."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
