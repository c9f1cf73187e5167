"""Evaluation: responses, judges, statistics; `evaluate` is its front door.

The names below load what they need when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenratio.evaluation.options import EvaluateOptions
    from tokenratio.evaluation.pipeline import evaluate
    from tokenratio.evaluation.results import Measure, PolicyMeasures

_HOMES = {
    "EvaluateOptions": "options",
    "Measure": "results",
    "PolicyMeasures": "results",
    "evaluate": "pipeline",
}
__all__ = ["EvaluateOptions", "Measure", "PolicyMeasures", "evaluate"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
