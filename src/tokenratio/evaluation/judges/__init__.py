"""Judges: which of two responses to a prompt is better?

`JUDGES` names them. Each is built from what it needs (a reward, a model, an endpoint, a file) and
then answers any comparison; see `Judge`.
"""

from tokenratio.evaluation.judges.cache import VerdictCache
from tokenratio.evaluation.judges.gold import GoldJudge
from tokenratio.evaluation.judges.human import HumanJudge, write_sheet
from tokenratio.evaluation.judges.implicit import ImplicitRewardJudge
from tokenratio.evaluation.judges.llm import LLMJudge
from tokenratio.evaluation.judges.protocol import Comparison, Judge, Verdict
from tokenratio.evaluation.judges.reward_model import RewardModelJudge
from tokenratio.evaluation.judges.templates import TEMPLATES, JudgeTemplate

JUDGES: dict[str, type[Judge]] = {
    "gold": GoldJudge,
    "reward-model": RewardModelJudge,
    "implicit": ImplicitRewardJudge,
    "llm": LLMJudge,
    "human": HumanJudge,
}

__all__ = [
    "JUDGES",
    "TEMPLATES",
    "Comparison",
    "GoldJudge",
    "HumanJudge",
    "ImplicitRewardJudge",
    "Judge",
    "JudgeTemplate",
    "LLMJudge",
    "RewardModelJudge",
    "Verdict",
    "VerdictCache",
    "write_sheet",
]
