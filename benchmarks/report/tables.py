"""Markdown tables of one benchmark on one device."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

from benchmarks.harness.rows import Row

COLUMNS = 4  # cases side by side in one summary table


def group(rows: Iterable[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows by the values of some fields, in the order they came."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(_text(row[key]) for key in keys), []).append(row)
    return groups


def case_name(row: Row) -> str:
    """Its parameters in short, such as ``R 6272, D 1024, V 32768, random, bfloat16``."""
    case = row["case"]
    return ", ".join(str(value) if isinstance(value, str) else f"{key} {value}" for key, value in case.items())


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """Providers down, cases across; each cell the time and its ratio to the reference."""
    cases = list(group(rows, "case").values())
    timed = {row["contestant"] for row in rows if "seconds" in row}
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    for first in range(0, len(cases), COLUMNS):
        part = [{row["contestant"]: row for row in case} for case in cases[first : first + COLUMNS]]
        heads = [case_name(next(iter(case.values()))) for case in part]
        yield f"| | computes | {' | '.join(heads)} |"
        yield "|---|---|" + "---:|" * len(part)
        for name in names:
            present = [case[name] for case in part if name in case]
            # `absent` lists those that are timed nowhere.
            if present and name in timed:
                cells = [_cell(case.get(name)) for case in part]
                yield f"| {name} | {present[0].get('does', '')} | {' | '.join(cells)} |"
        yield ""


def details(rows: Sequence[Row]) -> Iterator[str]:
    """One line per case and provider, with everything a row knows."""
    columns = "case | provider | median ms | quartiles ms | rounds | over reference | noise of the reference"
    yield f"| {columns} | extra MiB | MiB in all | error | tokens/s | of the FLOP ceiling | load | timed by |"
    yield "|---|---|" + "---:|" * 11 + "---|"
    for row in rows:
        if "seconds" not in row:
            continue
        seconds, ratio, noise = row["seconds"], row["ratio"], row["noise"]
        memory, error = row.get("memory"), row.get("error")
        cells = [
            case_name(row),
            row["contestant"],
            f"{seconds['median'] * 1e3:.3f}",
            f"{seconds['p25'] * 1e3:.3f} to {seconds['p75'] * 1e3:.3f}",
            str(seconds["rounds"]),
            f"{ratio['median']:.3f} ({ratio['p25']:.3f} to {ratio['p75']:.3f})",
            f"{noise['p25']:.3f} to {noise['p75']:.3f}",
            f"{memory['delta'] / 2**20:.1f}" if memory else "",
            f"{memory['absolute'] / 2**20:.0f}" if memory else "",
            f"{max(error.values()):.1e}" if error else "",
            f"{row['work']['tokens'] / seconds['median']:,.0f}" if row["work"]["tokens"] else "",
            ceiling_fraction(row),
            str(row["clock"].get("load", "")),
            row["timing"],
        ]
        yield f"| {' | '.join(cells)} |"


def limits(rows: Sequence[Row]) -> Iterator[str]:
    """What was promised against what, and the worst case of it."""
    checks: dict[tuple[str, str], list[tuple[float, Row]]] = {}
    for row in rows:
        for other, check in row.get("limits", {}).items():
            who = f"{row['benchmark']}, {row['dtype']}, threads {row['threads']}"
            checks.setdefault((who, other), []).append((check["median"] / check["limit"], row))
    if checks:
        yield from ("| | against | cases | met | worst case | of its limit |", "|---|---|---:|---:|---|---:|")
    for (who, other), measured in checks.items():
        used, row = max(measured, key=lambda item: item[0])
        met = sum(used <= 1 for used, _ in measured)
        yield f"| {who} | {other} | {len(measured)} | {met} | {case_name(row)} | {used:.0%} |"


def absent(rows: Sequence[Row]) -> Iterator[str]:
    """Who has no time on any of these cases, and why."""
    timed = {row["contestant"] for row in rows if "seconds" in row}
    reasons = {}
    for row in rows:
        if "seconds" not in row and row["contestant"] not in timed:
            reasons[row["contestant"]] = f"{row['status']}: {row.get('reason') or 'no reason given'}"
    for name, reason in reasons.items():
        yield f"- {name}: {reason}"


def ceiling_fraction(row: Row) -> str:
    """FLOP/s over those of a large square product on the same device; for a training step that is its MFU."""
    if not row["work"]["flops"] or "ceiling" not in row:
        return ""
    return f"{row['work']['flops'] / row['seconds']['median'] / row['ceiling']['flops_per_second']:.1%}"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if "seconds" not in row:
        return row["status"]
    return f"{_milliseconds(row['seconds']['median'])} (x {row['ratio']['median']:.2f})"


def _milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.3g} ms" if value < 100 else f"{value:,.0f} ms"


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
