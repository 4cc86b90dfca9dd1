"""What every benchmark shares: contests on the same operands, interleaved timing, peak memory, rows of results."""

from benchmarks.harness.contest import Case, Contest, Contestant, DeviceLost, Settings, Wrong, run_case

__all__ = ["Case", "Contest", "Contestant", "DeviceLost", "Settings", "Wrong", "run_case"]
