"""Evaluation: responses, judges and statistics; `evaluate` runs all of it.

The names below load what they need when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenratio.evaluation.options import EvaluateOptions
    from tokenratio.evaluation.pipeline import evaluate
    from tokenratio.evaluation.results import Measure, PolicyMeasures

__all__ = ["EvaluateOptions", "Measure", "PolicyMeasures", "evaluate"]
_MODULES = {"EvaluateOptions": "options", "evaluate": "pipeline"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'results')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
