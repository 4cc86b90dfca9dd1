"""A run on a folder: it is checked whole before it is tokenised, and what is left out is listed."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from ntpseg.data import MaskOptions, Record, inspect_dataset, problem_table
from ntpseg.data.checks import Checked
from ntpseg.data.loading import require_usable
from ntpseg.data.problems import Problem, summary
from ntpseg.data.records import check_mask_value
from ntpseg.training.config import RunConfig
from ntpseg.training.run_data import RunData
from ntpseg.training.same_data import in_stored_order
from ntpseg.training.sampling import write_sampling
from ntpseg.utils.files import write_jsonl


class FolderData(RunData):
    """The pairs of a folder, checked when they are first asked for.

    Args:
        config: the run's.
        run: its directory; what is left out is listed there.
        again: a cache is built again, of pairs in the order that the run began with.
    """

    def __init__(self, config: RunConfig, run: Path, *, again: bool = False) -> None:
        self._config, self._run, self._again = config, run, again

    def pairs(self, split: str) -> Sequence[Record]:
        found = [record for record in self._records if record.split == split]
        return in_stored_order(found, self._run) if self._again else found

    def texts(self) -> Iterable[str]:
        return (record.text for record in self.pairs("train"))

    def views(self) -> Iterable[tuple[str, str]]:
        return views_of(self.pairs("train"))

    def write_sampling(self, run: Path) -> None:
        write_sampling(run, self.pairs("train"))

    @cached_property
    def _records(self) -> list[Record]:
        data = self._config.data
        if data.path is None:
            raise ValueError("data.path must be the folder of a data set, got null")
        check_mask_value("data.mask_value", data.mask_value or "")
        masks = MaskOptions(data.keep_empty, data.mask_value or "")
        checked = inspect_dataset(data.path, data.layout, masks=masks)
        require_usable(checked, data.path, skip_bad=data.skip_bad)
        _report_notes(checked)
        if checked.problems:
            _report_left_out(checked.problems, self._run)
        return [record for record in checked.records if record.mask is not None]


def views_of(records: Iterable[Record]) -> list[tuple[str, str]]:
    """Axis and window of each record, "" where one is unknown."""
    return [("", "") if r.place is None else (r.place.axis, r.place.window) for r in records]


def _report_notes(checked: Checked) -> None:
    """Say on standard error what `ntpseg data check` lists."""
    if checked.negatives:
        print(f"{checked.negatives} of {len(checked.records)} pairs hold no finding and are kept", file=sys.stderr)
    if checked.notes:
        print(f"{summary(checked.notes, 'note')} (ntpseg data check lists them)", file=sys.stderr)


def _report_left_out(problems: Sequence[Problem], run: Path) -> None:
    """Print what was left out, and write all of it to ``run/left_out.jsonl``."""
    from rich.console import Console

    console = Console(stderr=True)
    console.print(problem_table(problems, title="Left out", limit=50))
    console.print(summary(problems), highlight=False)
    write_jsonl(run / "left_out.jsonl", [dataclasses.asdict(p) for p in problems])
