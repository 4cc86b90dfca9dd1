"""The bars of a job count what its callbacks report."""

from __future__ import annotations

import io

from rich.console import Console

from ntpseg.utils.progress import counter, stage_progress


def test_counter_reports_the_sum() -> None:
    calls = []
    advance = counter(lambda *call: calls.append(call), "reading", 5)
    for count in (2, 2, 1):
        advance(count)
    assert calls == [("reading", 2, 5), ("reading", 4, 5), ("reading", 5, 5)]


def test_every_stage_has_its_bar() -> None:
    stream = io.StringIO()
    with stage_progress(Console(file=stream, force_terminal=True, width=100)) as progress:
        for stage in ("reading", "scoring"):
            progress(stage, 3, 7)
    text = stream.getvalue()
    assert "reading" in text and "scoring" in text and "3/7" in text


def test_a_disabled_bar_draws_nothing() -> None:
    stream = io.StringIO()
    with stage_progress(Console(file=stream, force_terminal=True), enabled=False) as progress:
        progress("reading", 1, 2)
    assert stream.getvalue().strip() == ""


def test_a_log_has_no_bars() -> None:
    stream = io.StringIO()
    with stage_progress(Console(file=stream)) as progress:
        progress("reading", 1, 2)
    assert stream.getvalue() == ""
