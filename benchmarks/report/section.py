"""The benchmark section of a Markdown file: written between two markers, the rest of the file left as it is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.harness.environment import ROOT
from benchmarks.harness.rows import Row, read
from benchmarks.report.plots import draw
from benchmarks.report.tables import absent, details, group, summary

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
TITLES = {
    "loss": "Loss, forward and backward",
    "topn": "Ranking the hardest errors",
    "attention": "Causal attention, forward and backward",
    "decode": "Decoding masks",
    "train": "A whole training step",
}
_HOW = """Every figure is taken beside a reference made of the plain matrix products of the same operands (for the
ranking: of copies, on a GPU of the `torch.topk` composition), in one process, in turns; a ratio is the median over
rounds of the ratio within a round, so that other load on the machine falls on both. "Noise" is the same ratio of the
reference to itself. A contestant is timed only after its result was held against float64 (decoding: against a plain
float32 forward pass). Extra memory is the peak during a step beyond what was there before it. Peers' cross-entropies
compute CE alone; "+ terms" adds TCL and HET to them in plain PyTorch. `ntpseg bench` measures, `ntpseg bench report`
writes this section from the rows in `benchmarks/results/`."""
_CAPTION = "Ratio to the reference in brackets; smaller is better."


def write_report(results: Path, docs: Path | None = None) -> Path:
    """Replaces the section (or adds it at the end) and draws the plots beside the file, in figures/.

    Args:
        results: folder of the JSON rows.
        docs: the Markdown file; docs/results.md of the checkout by default.

    Returns:
        The file that was written.

    Raises:
        ValueError: the folder has no rows.
    """
    path = docs or ROOT / "docs" / "results.md"
    rows = read(results)
    if not rows:
        raise ValueError(f"results is {results}, where there are no rows; ntpseg bench makes them")
    body = "\n".join([BEGIN, *_section(rows, path.parent), *_profiles(results), END])
    old = path.read_text(encoding="utf-8") if path.exists() else "# Results\n"
    if BEGIN in old and END in old:
        start, stop = old.index(BEGIN), old.index(END) + len(END)
        new = old[:start] + body + old[stop:]
    else:
        new = old.rstrip("\n") + "\n\n## Benchmarks\n\n" + body + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(new, encoding="utf-8")
    partial.replace(path)
    print(f"{len(rows)} rows, section written to {path}")
    return path


def _section(rows: Sequence[Row], folder: Path) -> Iterator[str]:
    yield ""
    yield _HOW
    yield ""
    yield from _outstanding(rows)
    for (kind, device), here in group(rows, "kind", "device").items():
        yield f"### {device}"
        yield ""
        yield from _machine(here)
        for (benchmark,), some in group(here, "benchmark").items():
            yield f"#### {TITLES.get(benchmark, benchmark)}"
            yield ""
            yield _CAPTION
            yield ""
            yield from summary(some)
            slug = re.sub(r"[^a-z0-9]+", "-", device.split(",")[0].lower()).strip("-")
            for title, path in draw(some, folder / "figures", f"bench-{benchmark}-{kind}-{slug}"):
                yield f"![{title}: {TITLES.get(benchmark, benchmark)}]({path.relative_to(folder).as_posix()})"
            missing = list(absent(some))
            if missing:
                yield ""
                yield "Without a time here:"
                yield ""
                yield from missing
            yield ""
            yield "<details><summary>All figures</summary>"
            yield ""
            yield from details(some)
            yield ""
            yield "</details>"
            yield ""


def _profiles(results: Path) -> Iterator[str]:
    """Where the loss spends its time, from `benchmarks.profile_loss`."""
    for path in sorted(results.glob("profile-*.json")):
        for it in json.loads(path.read_text(encoding="utf-8"))["profiles"]:
            case = ", ".join(f"{key} {value}" for key, value in it["case"].items())
            yield f"### Kernels of the loss: {case}"
            yield ""
            yield f"{it['device']}, backend {it['backend']}, commit {it['commit']}; by torch.profiler, per step."
            yield ""
            yield "| kernel | launches | microseconds | share |"
            yield "|---|---:|---:|---:|"
            for row in it["kernels"][:12]:
                name = row["kernel"].replace("|", "\\|")
                yield f"| `{name}` | {row['calls']:g} | {row['seconds'] * 1e6:,.0f} | {row['share']:.1%} |"
            yield ""
            launches = it.get("ncu", {}).get("kernels", [])
            if launches:
                yield "| by Nsight Compute | microseconds | compute, % of peak | memory, % of peak |"
                yield "|---|---:|---:|---:|"
                for row in sorted(launches, key=lambda row: -row.get("nanoseconds", 0))[:12]:
                    name = row["kernel"].replace("|", "\\|")
                    percent = [f"{row.get(key, float('nan')):.0f}" for key in ("compute_percent", "memory_percent")]
                    yield f"| `{name}` | {row.get('nanoseconds', 0) / 1e3:,.0f} | {' | '.join(percent)} |"
                yield ""
            elif "ncu" in it:
                yield f"Nsight Compute: {it['ncu'].get('unavailable', 'nothing')}"
                yield ""


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
    missing = [name for name in TITLES if name not in done]
    yield "### Outstanding"
    yield ""
    if not missing:
        yield "All five benchmarks have been measured on a GPU; who has no time there is named under each table."
    elif len(missing) == len(TITLES):
        yield "**No figure here was taken on a GPU.** No GPU was there when this was written. Outstanding are all GPU"
        yield "figures of:"
    else:
        yield "Outstanding are the GPU figures of:"
    yield ""
    for name in missing:
        yield f"- {TITLES[name].lower()} (`ntpseg bench {name}`)"
    if missing:
        yield ""
        yield "`make gpu-check` takes them on any machine with a CUDA device and writes them here."
        if "loss" in missing:
            yield "The Triton loss, torch.compile, Liger, cut-cross-entropy and QuACK are therefore without a GPU time;"
            yield "nothing is claimed about their speed relative to each other."
        yield ""
