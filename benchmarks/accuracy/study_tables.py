"""The tables of an accuracy study and its result in one file, from its cells' JSON files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.cells import GROUPS, ONE_PASS
from ntpseg.utils.files import write_text

# Dice and IoU in percent as their papers print them; which family a paper means is what its code computes.
PUBLISHED = (
    ("U-Net", "per image", 79.02, 69.46),
    ("LViT", "per image", 83.66, 75.11),
    ("RecLMIS", "per image", 85.22, 77.00),
    ("SwinTextUNet", "per image", 86.47, 78.2),
    ("LanGuideMedSeg", "pooled", 89.78, 81.45),
    ("BiCLIP", "pooled", 90.59, 82.81),
)


def load_cells(study: Path) -> list[dict[str, Any]]:
    """The results of all cells, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((study / "cells").glob("*.json"))]


def write_result(study: Path, command: str) -> Path:
    """Write all cells into ``study.json``, scores with four digits, for a commit.

    Args:
        study: the study's folder.
        command: that was run last.
    """
    machines: list[Any] = []
    cells = []
    for cell in load_cells(study):
        machine = cell.pop("machine", None)
        if machine not in machines:
            machines.append(machine)
        for split in ("val", "test"):
            if split in cell:
                cell[split] = {key: cell[split][key] for key in ("cases", "per_image", "pooled") if key in cell[split]}
        if "choice" in cell:
            cell["choice"] = {key: cell["choice"][key] for key in ("options", "cases")}
        cells.append(_rounded({**cell, "machine": machines.index(machine)}))
    path = study / "study.json"
    head = {"benchmark": "accuracy study", "command": command, "machines": machines}
    # A line for each cell, so that a change of one is a change of one line.
    rows = ",\n".join(json.dumps(cell, ensure_ascii=False, separators=(",", ":")) for cell in cells)
    write_text(path, f'{json.dumps(head, ensure_ascii=False)[:-1]}, "cells": [\n{rows}\n]}}\n')
    return path


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def write_tables(study: Path) -> Path:
    """Write ``tables.md`` into the study's folder."""
    cells = load_cells(study)
    parts = ["# Accuracy study", ""]
    looked = sum("test" in cell for cell in cells)
    models = sum("same_as" not in cell and cell.get("model") != "decode" for cell in cells)
    parts += [f"{models} models; the test split was scored {looked} times, once for each model of the main table."]
    machines = list(dict.fromkeys(json.dumps(cell["machine"]) for cell in cells if "machine" in cell))
    if len(machines) > 1:
        parts += ["", "Trained on different machines, whose minutes differ: " + "; ".join(machines)]
    for group in GROUPS:
        chosen = [cell for cell in cells if cell["group"] == group]
        if chosen:
            table = _decoding_table(chosen) if group == "decoding" else _table(chosen, group)
            parts += ["", f"## {group.capitalize()}", "", *table]
    parts += ["", "## Published", "", *_published()]
    path = study / "tables.md"
    write_text(path, "\n".join(parts) + "\n")
    return path


def _table(cells: Sequence[dict[str, Any]], group: str) -> list[str]:
    split = "test" if group == "main" else "val"
    rows = [
        f"| model | core-minutes | seeds | steps | parameters | val Dice per image | {split} Dice per image | "
        f"{split} pooled | {split} IoU per image | {split} pooled IoU |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    labels = list(dict.fromkeys((cell["minutes"], cell["label"]) for cell in cells))
    for minutes, label in sorted(labels, key=lambda key: key[0]):
        seeds = [cell for cell in cells if (cell["minutes"], cell["label"]) == (minutes, label)]
        parameters = seeds[0].get("parameters")
        fields = [
            label,
            f"{minutes:g}",
            str(len(seeds)),
            f"{statistics.median(cell.get('steps', 0) for cell in seeds):,.0f}",
            "" if parameters is None else f"{parameters / 1e6:.2f}M",
            _over_seeds(seeds, "val", "per_image", "dice"),
            _over_seeds(seeds, split, "per_image", "dice", interval=True),
            _over_seeds(seeds, split, "pooled", "dice", interval=True),
            _over_seeds(seeds, split, "per_image", "iou"),
            _over_seeds(seeds, split, "pooled", "iou"),
        ]
        rows.append(f"| {' | '.join(fields)} |")
    return rows


def _decoding_table(cells: Sequence[dict[str, Any]]) -> list[str]:
    rows = [
        "| decoding | seeds | cases | val Dice per image | val pooled | tokens per second | times one pass |",
        "|---|---|---|---|---|---|---|",
    ]
    fastest = {cell["seed"]: cell["decoding"]["seconds"] for cell in cells if cell["label"] == ONE_PASS}
    for label in dict.fromkeys(cell["label"] for cell in cells):
        seeds = [cell for cell in cells if cell["label"] == label]
        speed = statistics.median(cell["decoding"]["tokens_per_second"] for cell in seeds)
        ratios = [c["decoding"]["seconds"] / fastest[c["seed"]] for c in seeds if c["seed"] in fastest]
        fields = [label, str(len(seeds)), str(seeds[0]["val"]["cases"])]
        fields += [_over_seeds(seeds, "val", "per_image", "dice"), _over_seeds(seeds, "val", "pooled", "dice")]
        fields += [f"{speed:,.0f}", f"{statistics.median(ratios):.1f}" if ratios else ""]
        rows.append(f"| {' | '.join(fields)} |")
    return rows


def _over_seeds(cells: Sequence[dict[str, Any]], split: str, family: str, metric: str, interval: bool = False) -> str:
    """Median over seeds with its range, and the median seed's interval over subjects."""
    found = [cell[split][family][metric] for cell in cells if split in cell]
    if not found:
        return ""
    found.sort(key=lambda estimate: estimate["value"])
    middle = found[(len(found) - 1) // 2]
    text = f"{statistics.median(estimate['value'] for estimate in found):.4f}"
    if len(found) > 1:
        text += f" ({found[0]['value']:.4f} to {found[-1]['value']:.4f})"
    if interval and middle.get("low") is not None:
        text += f" [{middle['low']:.3f}, {middle['high']:.3f}]"
    return text


def _published() -> list[str]:
    rows = ["| model | family | Dice | IoU |", "|---|---|---|---|"]
    return rows + [f"| {name} | {family} | {dice:.2f} | {iou:.2f} |" for name, family, dice, iou in PUBLISHED]
