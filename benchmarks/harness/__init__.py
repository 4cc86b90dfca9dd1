"""What every benchmark shares: providers of the same work on the same operands, timing in turns, peak memory, rows."""

from benchmarks.harness.accuracy import Inaccurate, check_errors, relative_error
from benchmarks.harness.comparison import PEAK, Case, Comparison, DeviceLost, Grid, Provider, Settings, run_case

__all__ = [
    "PEAK",
    "Case",
    "Comparison",
    "DeviceLost",
    "Grid",
    "Inaccurate",
    "Provider",
    "Settings",
    "check_errors",
    "relative_error",
    "run_case",
]
