"""What every benchmark shares: providers of the same work on the same operands, timing in turns, peak memory, rows."""

from benchmarks.harness.accuracy import Inaccurate, check_errors, relative_error
from benchmarks.harness.comparison import Case, Comparison, DeviceLost, Grid, Provider, Settings, run_case
from benchmarks.harness.limits import Limits

__all__ = [
    "Case",
    "Comparison",
    "DeviceLost",
    "Grid",
    "Inaccurate",
    "Limits",
    "Provider",
    "Settings",
    "check_errors",
    "relative_error",
    "run_case",
]
