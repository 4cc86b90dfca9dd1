"""``make fuzz EXAMPLES=N``: N inputs spread over all fuzz tests, and how many of them failed.

    python tests/fuzz.py 100000 [further arguments of pytest]

Every test in a ``test_fuzz_*.py`` gets an equal share. Hypothesis stops a test at the first failure and shrinks it to a
small input, so one that failed counts another number than its share. Exits with 1 where one failed, or none ran.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from fuzz_settings import EXAMPLES

ROOT = Path(__file__).resolve().parent.parent
COMMON = ["-n", "0", "--timeout=0"]


class Count:
    """A pytest plugin that counts the inputs which hypothesis gave to each test."""

    def __init__(self) -> None:
        self.inputs: Counter[str] = Counter()
        self.failures: dict[str, str] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Puts itself between hypothesis and the test, in the place that hypothesis offers to plugins."""
        handle = getattr(getattr(item, "obj", None), "hypothesis", None)
        if handle is None:
            return (yield)
        inner = handle.inner_test

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.inputs[item.nodeid] += 1
            return inner(*args, **kwargs)

        handle.inner_test = counted
        try:
            return (yield)
        finally:
            handle.inner_test = inner

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keeps the first line of an error."""
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failures[report.nodeid] = str(getattr(crash, "message", report.longrepr)).splitlines()[0]


def count_tests(files: list[str], arguments: list[str]) -> int:
    """How many tests there are to share the inputs, found by a process of its own: importing them fixes their share."""
    command = [sys.executable, str(Path(__file__)), "--count", *arguments, *files]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        sys.exit(f"the fuzz tests must be there to be collected, got\n{found.stdout[-2000:]}{found.stderr[-2000:]}")
    return int(found.stdout.splitlines()[-1])


class Collected:
    """A pytest plugin that counts the tests to which hypothesis gives inputs."""

    tests = 0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Leaves out what stands in the same files without inputs."""
        self.tests = sum(hasattr(getattr(item, "obj", None), "hypothesis") for item in session.items)


def main() -> int:
    """Run them."""
    if sys.argv[1] == "--count":
        collected = Collected()
        code = pytest.main(["--collect-only", *COMMON, *sys.argv[2:]], plugins=[collected])
        print(collected.tests)
        return int(code)
    asked, arguments = int(sys.argv[1]), sys.argv[2:]
    files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").rglob("test_fuzz_*.py"))]
    share = -(-asked // max(count_tests(files, arguments), 1))
    print(f"{share} inputs for each test of {', '.join(files)}", flush=True)
    os.environ[EXAMPLES] = str(share)
    os.chdir(ROOT)
    count = Count()
    code = pytest.main([*COMMON, "--tb=short", *arguments, *files], plugins=[count])
    for test in sorted({*count.inputs, *count.failures}):
        failed = f"  FAILED: {count.failures[test]}" if test in count.failures else ""
        print(f"{count.inputs[test]:>9}  {test}{failed}")
    print(f"{sum(count.inputs.values())} inputs, {len(count.failures)} failures")
    return int(code != 0 or not count.inputs)


if __name__ == "__main__":
    sys.exit(main())
