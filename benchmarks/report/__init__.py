"""Tables and plots from the rows of results: an index, docs/benchmarks.md, and one page a machine below it."""

from benchmarks.report.pages import write_report

__all__ = ["write_report"]
