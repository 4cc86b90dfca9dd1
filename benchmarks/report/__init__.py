"""Tables and plots from the rows of results, written into the benchmark section of docs/results.md."""

from benchmarks.report.section import write_report

__all__ = ["write_report"]
