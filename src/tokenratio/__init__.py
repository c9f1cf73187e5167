"""TBPO: token-level Bregman preference optimization (arXiv 2605.12288).

The public names. Each loads what it needs when it is first used, so `import tokenratio` is quick.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from tokenratio.bregman import Basu as Basu
    from tokenratio.bregman import BregmanGenerator as BregmanGenerator
    from tokenratio.bregman import Kliep as Kliep
    from tokenratio.bregman import Logistic as Logistic
    from tokenratio.bregman import Lsif as Lsif
    from tokenratio.bregman import ScaledBasu as ScaledBasu
    from tokenratio.bregman import make_generator as make_generator
    from tokenratio.errors import TokenRatioError as TokenRatioError
    from tokenratio.evaluation.comparison import compare as compare
    from tokenratio.evaluation.judges.gold import GoldJudge as GoldJudge
    from tokenratio.evaluation.judges.human import HumanJudge as HumanJudge
    from tokenratio.evaluation.judges.implicit import ImplicitRewardJudge as ImplicitRewardJudge
    from tokenratio.evaluation.judges.llm import LLMJudge as LLMJudge
    from tokenratio.evaluation.judges.protocol import Judge as Judge
    from tokenratio.evaluation.judges.reward_model import RewardModelJudge as RewardModelJudge
    from tokenratio.evaluation.options import EvaluateOptions as EvaluateOptions
    from tokenratio.evaluation.pipeline import evaluate as evaluate
    from tokenratio.evaluation.results import PolicyMeasures as PolicyMeasures
    from tokenratio.losses import METHODS as METHODS
    from tokenratio.losses import arc_bpo_loss as arc_bpo_loss
    from tokenratio.losses import bpo_loss as bpo_loss
    from tokenratio.losses import dpo_loss as dpo_loss
    from tokenratio.losses import ipo_loss as ipo_loss
    from tokenratio.losses import sepo_loss as sepo_loss
    from tokenratio.losses import sft_loss as sft_loss
    from tokenratio.losses import simpo_loss as simpo_loss
    from tokenratio.losses import t_reg_loss as t_reg_loss
    from tokenratio.losses import tbpo_loss as tbpo_loss
    from tokenratio.losses import tis_dpo_loss as tis_dpo_loss
    from tokenratio.models.packages import packaged_model as packaged_model
    from tokenratio.report.credit import inspect_pairs as inspect_pairs
    from tokenratio.report.credit_options import InspectOptions as InspectOptions
    from tokenratio.report.credit_page import write_credit_page as write_credit_page
    from tokenratio.report.run_report import write_report as write_report
    from tokenratio.statistics import token_statistics as token_statistics
    from tokenratio.training.config import TokenRatioConfig as TokenRatioConfig
    from tokenratio.training.reward_trainer import RewardConfig as RewardConfig
    from tokenratio.training.reward_trainer import RewardTrainer as RewardTrainer
    from tokenratio.training.trainer import TokenRatioTrainer as TokenRatioTrainer

__version__ = "0.1.0"

# Public names by the module that defines them.
_PUBLIC = {
    "bregman": "Basu BregmanGenerator Kliep Logistic Lsif ScaledBasu make_generator",
    "errors": "TokenRatioError",
    "evaluation.comparison": "compare",
    "evaluation.judges.gold": "GoldJudge",
    "evaluation.judges.human": "HumanJudge",
    "evaluation.judges.implicit": "ImplicitRewardJudge",
    "evaluation.judges.llm": "LLMJudge",
    "evaluation.judges.protocol": "Judge",
    "evaluation.judges.reward_model": "RewardModelJudge",
    "evaluation.options": "EvaluateOptions",
    "evaluation.pipeline": "evaluate",
    "evaluation.results": "PolicyMeasures",
    "losses": "METHODS arc_bpo_loss bpo_loss dpo_loss ipo_loss sepo_loss sft_loss simpo_loss "
    "t_reg_loss tbpo_loss tis_dpo_loss",
    "models.packages": "packaged_model",
    "report.credit": "inspect_pairs",
    "report.credit_options": "InspectOptions",
    "report.credit_page": "write_credit_page",
    "report.run_report": "write_report",
    "statistics": "token_statistics",
    "training.config": "TokenRatioConfig",
    "training.reward_trainer": "RewardConfig RewardTrainer",
    "training.trainer": "TokenRatioTrainer",
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names.split()}
__all__ = sorted([*_MODULES, "__version__"])


def __getattr__(name: str) -> _Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
