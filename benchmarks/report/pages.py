"""The pages of results: an index between two markers of a Markdown file, and one page a machine beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.environment import ROOT, slug
from benchmarks.harness.rows import Row, read
from benchmarks.registry import BENCHMARKS
from benchmarks.report.plots import draw
from benchmarks.report.tables import absent, details, group, limits, summary
from ntpseg.utils.files import write_text

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
_CAPTION = "Ratio to the reference in brackets; smaller is better."


def write_report(results: Path, docs: Path | None = None) -> Path:
    """Replaces the index's section (or adds it at the end), and writes the machines' pages and plots.

    Args:
        results: folder of the JSON rows.
        docs: the index; docs/benchmarks.md of the checkout by default. ``docs/benchmarks/MACHINE.md`` are its pages and
            ``docs/figures/`` has the plots.

    Returns:
        The index.

    Raises:
        ValueError: the folder has no rows.
    """
    path = docs or ROOT / "docs" / "benchmarks.md"
    rows = [row for row in read(results) if row["benchmark"] in BENCHMARKS]  # tuning has rows too, and no page
    if not rows:
        raise ValueError(f"results must be a folder with rows that ntpseg bench made, got {results}, which has no rows")
    pages = path.with_suffix("")
    index = [BEGIN, "", *_outstanding(rows), "## Machines", ""]
    for (kind, device), here in group(rows, "kind", "device").items():
        name = f"{kind}-{slug(device)}"
        page = [f"# {device}", "", *_machine(here), *_benchmarks(here, path.parent / "figures", name)]
        page += _profiles(results, device)
        write_text(pages / f"{name}.md", "\n".join(page).rstrip("\n") + "\n")
        names = ", ".join(dict.fromkeys(row["benchmark"] for row in here))
        index.append(f"- [{device}]({pages.name}/{name}.md): {names}")
    body = "\n".join([*index, "", END])
    old = path.read_text(encoding="utf-8") if path.exists() else "# Benchmarks\n"
    if BEGIN in old and END in old:
        new = old[: old.index(BEGIN)] + body + old[old.index(END) + len(END) :]
    else:
        new = f"{old.rstrip()}\n\n{body}\n"
    write_text(path, new)
    print(f"{len(rows)} rows, written to {path} and {pages}")
    return path


def _benchmarks(rows: Sequence[Row], figures: Path, machine: str) -> Iterator[str]:
    for (benchmark,), some in group(rows, "benchmark").items():
        title = BENCHMARKS[benchmark].title
        yield from (f"## {title}", "", _CAPTION, "")
        cases = [row for row in some if row.get("grid") != "gate"]  # of hundreds of cases, limits say enough
        yield from summary(cases)
        for plot, path in draw(cases, figures, f"bench-{benchmark}-{machine}"):
            yield f"![{plot}: {title}](../{figures.name}/{path.name})"
        missing = list(absent(cases))
        if missing:
            yield from ("", "Without a time here:", "", *missing)
        yield from ("", *limits(some))
        yield from ("", "<details><summary>All figures</summary>", "", *details(cases), "", "</details>", "")


def _profiles(results: Path, device: str) -> Iterator[str]:
    """Where the loss spends its time, from `benchmarks.profile_loss`."""
    for path in sorted(results.glob("profile-*.json")):
        for profile in json.loads(path.read_text(encoding="utf-8"))["profiles"]:
            if profile["device"] == device:
                yield from _profile(profile)


def _profile(profile: dict[str, Any]) -> Iterator[str]:
    case = ", ".join(f"{key} {value}" for key, value in profile["case"].items())
    yield from (f"## Kernels of the loss: {case}", "")
    yield f"Backend {profile['backend']}, commit {profile['commit']}; by torch.profiler, per step."
    yield from ("", "| kernel | launches | microseconds | share |", "|---|---:|---:|---:|")
    for row in profile["kernels"][:12]:
        yield f"| {_code(row['kernel'])} | {row['calls']:g} | {row['seconds'] * 1e6:,.0f} | {row['share']:.1%} |"
    yield ""
    launches = profile.get("ncu", {}).get("kernels", [])
    if launches:
        yield "| by Nsight Compute | microseconds | compute, % of peak | memory, % of peak |"
        yield "|---|---:|---:|---:|"
        for row in sorted(launches, key=lambda row: -row.get("nanoseconds", 0))[:12]:
            percent = [f"{row.get(key, float('nan')):.0f}" for key in ("compute_percent", "memory_percent")]
            yield f"| {_code(row['kernel'])} | {row.get('nanoseconds', 0) / 1e3:,.0f} | {' | '.join(percent)} |"
        yield ""
    elif "ncu" in profile:
        yield from (f"Nsight Compute: {profile['ncu'].get('unavailable', 'nothing')}", "")


def _code(kernel: str) -> str:
    return "`" + kernel.replace("|", "\\|") + "`"


def _machine(rows: Sequence[Row]) -> Iterator[str]:
    first = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    threads: dict[int, list[str]] = {}
    for row in rows:
        names = threads.setdefault(row.get("threads", 0), [])
        if row["benchmark"] not in names:
            names.append(row["benchmark"])
    where = f"Driver {first['driver']}"
    if "threads" in first:
        each = "; ".join(f"{count} ({', '.join(names)})" for count, names in threads.items())
        where = f"CPU threads: {each if len(threads) > 1 else next(iter(threads))}"
    yield f'{where}; {versions}. Commit {commits} ("+": with uncommitted changes).'
    loads = [row["clock"]["load"] for row in rows if "clock" in row]
    if loads and first["kind"] == "cpu":
        yield f"Load average while measuring: {min(loads):.1f} to {max(loads):.1f}, this suite's own threads included."
    yield ""


def _outstanding(rows: Sequence[Row]) -> Iterator[str]:
    """What nobody has measured on a GPU yet."""
    done = {row["benchmark"] for row in rows if row["kind"] == "cuda" and "seconds" in row}
    missing = [name for name in BENCHMARKS if name not in done]
    yield from ("## Outstanding", "")
    if not missing:
        yield from ("All benchmarks have been measured on a GPU; who has no time is named under each table.", "")
        return
    if len(missing) == len(BENCHMARKS):
        yield "**No figure here was taken on a GPU**: none was there when this was written, so nothing is claimed about"
        yield "speed on one, ours or anybody's, and `tests/gpu` has not run. All GPU figures are outstanding:"
    else:
        yield "Outstanding are the GPU figures of:"
    yield ""
    for name in missing:
        benchmark = BENCHMARKS[name]
        yield f"- {benchmark.title.lower()} (`ntpseg bench {name}`): {benchmark.gpu_goal}"
    yield from (
        "",
        "`make gpu-check` takes them, in three stages of four minutes, and `ntpseg bench report` writes them here.",
        "",
    )
