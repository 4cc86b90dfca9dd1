"""Results as a table on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ntpseg.evaluation.metrics import METRICS, mm_metrics
from ntpseg.evaluation.volumes import volume_metrics

if TYPE_CHECKING:
    from rich.table import Table

MAX_GROUPS = 20


def interval(estimate: dict[str, Any], digits: int = 3) -> str:
    """``0.812 [0.790, 0.833]``, or the value alone where there is no interval."""
    value = f"{estimate['value']:.{digits}f}"
    if estimate["low"] is None:
        return value
    return f"{value} [{estimate['low']:.{digits}f}, {estimate['high']:.{digits}f}]"


def metric_rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Heading, per-image mean and pooled score of each metric.

    Distances are in millimetres where those of all images are known, and in pixels where none are; where some are,
    there are both, the millimetres with the number of images that they are the mean of.
    """
    rows = []
    millimetres = summary.get("millimetres", {})
    whole = {metric.source for metric in mm_metrics().values() if _is_whole(summary, metric.name)}
    for metric in METRICS.values():
        # A result that was written before the metric was added does not have it.
        if metric.name in summary["per_image"] and metric.name not in whole:
            mean, pooled = summary["per_image"][metric.name], summary["pooled"].get(metric.name)
            rows.append(
                (metric.heading, interval(mean, metric.digits), interval(pooled, metric.digits) if pooled else "")
            )
    for scored in mm_metrics().values():
        if scored.name in millimetres:
            cases = "" if _is_whole(summary, scored.name) else f", {millimetres[scored.name]['cases']} images"
            rows.append((f"{scored.heading}{cases}", interval(millimetres[scored.name], scored.digits), ""))
    return rows


def _is_whole(summary: dict[str, Any], name: str) -> bool:
    """Whether the millimetres of all cases are known."""
    return summary.get("millimetres", {}).get(name, {}).get("cases") == summary["cases"]


def volume_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Heading and mean over volumes of each volumetric score; empty where no image is a slice of a volume."""
    volumes = summary.get("volumes")
    if not volumes:
        return []
    rows = []
    for metric in volume_metrics().values():
        if metric.name in volumes["per_volume"]:
            estimate = volumes["per_volume"][metric.name]
            cases = "" if estimate["cases"] == volumes["cases"] else f", {estimate['cases']} of {volumes['cases']}"
            rows.append((f"{metric.heading}{cases}", interval(estimate, metric.digits)))
    return rows


def volume_label(summary: dict[str, Any]) -> str:
    """How much the volumetric scores are the mean of, such as "12 structures of 4 volumes, 310 slices"."""
    volumes = summary["volumes"]
    missing = f", {volumes['missing']} missing between them" if volumes["missing"] else ""
    counts = [(volumes["cases"], "structure"), (volumes["volumes"], "volume"), (volumes["slices"], "slice")]
    of, which, slices = (f"{number} {word}{'s' * (number != 1)}" for number, word in counts)
    return f"{of} of {which}, {slices}{missing}"


def volume_group_rows(summary: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Label, Dice, HD95 and volume error of each structure over volumes; empty with fewer than two structures."""
    groups = (summary.get("volumes") or {}).get("structures", {})
    rows = []
    for name, group in groups.items() if len(groups) > 1 else ():
        scores = group["per_volume"]
        shown = [(scores.get(key), digits) for key, digits in (("dice", 3), ("hd95_mm", 2), ("volume_error_ml", 2))]
        dice, distance, error = ("" if mean is None else interval(mean, digits) for mean, digits in shown)
        rows.append((f"{group['cases']} x {name or '(empty text)'}", dice, distance, error))
    return rows


def modality_rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Label, per-image Dice and pooled Dice of each modality; empty where there is one, or none is known."""
    return [
        (
            f"{group['cases']} x {name or 'modality unknown'}",
            interval(group["per_image"]["dice"]),
            interval(group["pooled"]["dice"]),
        )
        for name, group in summary.get("modalities", {}).items()
    ]


def text_check_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and per-image Dice of the right, the empty and another image's text; empty without a check."""
    check = summary.get("text_check")
    if not check:
        return []
    rows = [("right text", interval(check["right"])), ("empty text", interval(check["empty"]))]
    if check["other"]:
        rows.append(("another image's text", interval(check["other"])))
    return rows


def calibration_rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name of each calibration figure, without and with the model's temperature; see `ntpseg.evaluation.calibration`.

    The last is empty at a temperature of 1, and all of it for a result of a version without calibration.
    """
    found = summary.get("calibration")
    if not found:
        return []
    low, high = found["band"]
    before, after = found["uncalibrated"], found["calibrated"]
    scaled = before["temperature"] != after["temperature"]
    rows = []
    for part, where in ((None, "all pixels"), ("band", f"pixels of {low:g} to {high:g}")):
        first, second = (side[part] if part else side for side in (before, after))
        if first is None:
            continue
        for key, name in (("ece", "ECE"), ("brier", "Brier score"), ("nll", "NLL")):
            rows.append((f"{name}, {where}", f"{first[key]:.4f}", f"{second[key]:.4f}" if scaled else ""))
    return rows


def finding_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and figure of the cases with and without a finding; empty where all have one."""
    findings = summary.get("findings")
    if not findings or not findings["without"]:
        return []
    rows = []
    positive, negative = findings["with"], findings["without"]
    if positive:
        dice = interval(positive["per_image"]["dice"])
        rows.append((f"{positive['cases']} with a finding: Dice", f"{dice}, {positive['missed']} missed"))
    found = f"{negative['false_positives']} of {negative['cases']}"
    rows.append(
        (f"{negative['cases']} without: specificity", f"{interval(negative['specificity'])}, {found} not empty")
    )
    area = {key: None if value is None else 100 * value for key, value in negative["false_positive_area"].items()}
    rows.append((f"{negative['cases']} without: area predicted", f"{interval(area)} % of the image"))
    return rows


def summary_table(summary: dict[str, Any], title: str) -> Table:
    """One table: metrics with both averages named, the text check, the largest groups, speed."""
    from rich.table import Table
    from rich.text import Text

    level = f"{100 * summary['level']:g} %"
    table = Table(title=Text(title), caption=f"[{level} bootstrap interval over {summary['subjects']} subjects]")
    table.add_column(f"{summary['cases']} images")
    table.add_column("per-image mean", no_wrap=True)
    table.add_column("pooled over pixels", no_wrap=True)
    for row in metric_rows(summary):
        table.add_row(*row)
    table.add_row("Dice ceiling of the mask tokenizer", f"{summary['ceiling']:.3f}", "", end_section=True)
    rows = finding_rows(summary)
    for i, (name, figure) in enumerate(rows):
        table.add_row(name, figure, "", end_section=i + 1 == len(rows))
    rows = text_check_rows(summary)
    for i, (name, dice) in enumerate(rows):
        cases = f" ({summary['text_check']['cases']} images)" if i == 0 else ""
        table.add_row(f"Dice, {name}{cases}", dice, "", end_section=i + 1 == len(rows))
    calibration = calibration_rows(summary)
    for i, (name, before, after) in enumerate(calibration):
        at = f"{after} at temperature {summary['calibration']['calibrated']['temperature']:g}" if after else ""
        table.add_row(name, before, at, end_section=i + 1 == len(calibration))
    if "sample_dice" in summary:
        table.add_row("Dice between samples", f"{summary['sample_dice']:.3f}", "", end_section=True)
    groups = summary["groups"]
    if len(groups) > 1:
        shown = list(groups.items())[:MAX_GROUPS]
        for i, (text, group) in enumerate(shown):
            dice, pooled = interval(group["per_image"]["dice"]), interval(group["pooled"]["dice"])
            label = Text(f"{group['cases']} x {text or '(empty text)'}")
            table.add_row(label, f"Dice {dice}", f"Dice {pooled}", end_section=i + 1 == len(shown))
        if len(groups) > MAX_GROUPS:
            table.add_row(f"... and {len(groups) - MAX_GROUPS} more in summary.json", "", "", end_section=True)
    modalities = modality_rows(summary)
    for i, (modality, dice, pooled) in enumerate(modalities):
        table.add_row(Text(modality), f"Dice {dice}", f"Dice {pooled}", end_section=i + 1 == len(modalities))
    if volumes := volume_rows(summary):
        table.add_row(Text(volume_label(summary)), "mean over volumes", "")
        for i, (name, figure) in enumerate(volumes):
            table.add_row(f"{name}, volume", figure, "", end_section=i + 1 == len(volumes))
    by_structure = volume_group_rows(summary)
    for i, (structure, dice, distance, _) in enumerate(by_structure[:MAX_GROUPS]):
        cells = f"Dice {dice}", f"HD95 {distance} mm" if distance else ""
        table.add_row(Text(f"{structure}, volume"), *cells, end_section=i + 1 == len(by_structure[:MAX_GROUPS]))
    if len(by_structure) > MAX_GROUPS:
        table.add_row(f"... and {len(by_structure) - MAX_GROUPS} more in summary.json", "", "", end_section=True)
    decoding = summary["decoding"]
    speed = f"{decoding['tokens_per_second']:,.0f} tokens/s"
    table.add_row(f"decoding ({decoding['method']}, {decoding['dtype']})", speed, f"{decoding['seconds']:.1f} s")
    return table
