"""TBPO: token-level Bregman preference optimization (arXiv 2605.12288).

The names below load what they need when they are first used, so that `import tokenratio` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenratio.training.config import TokenRatioConfig
    from tokenratio.training.trainer import TokenRatioTrainer

__version__ = "0.1.0"
__all__ = ["TokenRatioConfig", "TokenRatioTrainer", "__version__"]

_HOMES = {
    "TokenRatioConfig": "tokenratio.training.config",
    "TokenRatioTrainer": "tokenratio.training.trainer",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
