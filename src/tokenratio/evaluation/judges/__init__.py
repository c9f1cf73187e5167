"""Judges: which of two responses to a prompt is better?

Each judge is built from what it needs (a reward, a model, an endpoint, a file) and then answers any
comparison; see `Judge`. The names below load what they need when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenratio.evaluation.judges.cache import VerdictCache
    from tokenratio.evaluation.judges.gold import GoldJudge
    from tokenratio.evaluation.judges.human import HumanJudge, write_sheet
    from tokenratio.evaluation.judges.implicit import ImplicitRewardJudge
    from tokenratio.evaluation.judges.llm import LLMJudge
    from tokenratio.evaluation.judges.protocol import Judge, ResponsePair, Verdict
    from tokenratio.evaluation.judges.reward_model import RewardModelJudge
    from tokenratio.evaluation.judges.templates import TEMPLATES, JudgeTemplate

_HOMES = {
    "TEMPLATES": "templates",
    "GoldJudge": "gold",
    "HumanJudge": "human",
    "ImplicitRewardJudge": "implicit",
    "Judge": "protocol",
    "JudgeTemplate": "templates",
    "LLMJudge": "llm",
    "ResponsePair": "protocol",
    "RewardModelJudge": "reward_model",
    "Verdict": "protocol",
    "VerdictCache": "cache",
    "write_sheet": "human",
}
__all__ = [
    "TEMPLATES",
    "GoldJudge",
    "HumanJudge",
    "ImplicitRewardJudge",
    "Judge",
    "JudgeTemplate",
    "LLMJudge",
    "ResponsePair",
    "RewardModelJudge",
    "Verdict",
    "VerdictCache",
    "write_sheet",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
