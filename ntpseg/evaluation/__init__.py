"""Metrics, evaluation runs and reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ntpseg.utils.lazy import lazy_exports

_EXPORTS = {
    "Bootstrap": "ntpseg.evaluation.summary",
    "Evaluation": "ntpseg.evaluation.result",
    "EvaluationOptions": "ntpseg.evaluation.evaluator",
    "METRICS": "ntpseg.evaluation.metrics",
    "dice_scores": "ntpseg.evaluation.metrics",
    "evaluate": "ntpseg.evaluation.evaluator",
    "segmentation_metrics": "ntpseg.evaluation.metrics",
    "summarise": "ntpseg.evaluation.summary",
    "summarise_groups": "ntpseg.evaluation.summary",
    "write_report": "ntpseg.evaluation.report",
}

__all__ = [
    "METRICS",
    "Bootstrap",
    "Evaluation",
    "EvaluationOptions",
    "dice_scores",
    "evaluate",
    "segmentation_metrics",
    "summarise",
    "summarise_groups",
    "write_report",
]

__getattr__ = lazy_exports(__name__, _EXPORTS)

if TYPE_CHECKING:
    from ntpseg.evaluation.evaluator import EvaluationOptions as EvaluationOptions
    from ntpseg.evaluation.evaluator import evaluate as evaluate
    from ntpseg.evaluation.metrics import METRICS as METRICS
    from ntpseg.evaluation.metrics import dice_scores as dice_scores
    from ntpseg.evaluation.metrics import segmentation_metrics as segmentation_metrics
    from ntpseg.evaluation.report import write_report as write_report
    from ntpseg.evaluation.result import Evaluation as Evaluation
    from ntpseg.evaluation.summary import Bootstrap as Bootstrap
    from ntpseg.evaluation.summary import summarise as summarise
    from ntpseg.evaluation.summary import summarise_groups as summarise_groups
