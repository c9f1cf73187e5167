"""The kinds of judges, and their settings from a recipe's entry or a command's flags."""

import re
from collections.abc import Mapping
from typing import Any

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.judges.gold import GoldSettings
from tokenratio.evaluation.judges.human import HumanSettings
from tokenratio.evaluation.judges.llm import LLMSettings
from tokenratio.evaluation.judges.model_settings import ImplicitSettings, RewardModelSettings
from tokenratio.evaluation.judges.protocol import JudgeSettings
from tokenratio.settings import build, check_known

JUDGES: dict[str, type[JudgeSettings]] = {
    "gold": GoldSettings,
    "reward-model": RewardModelSettings,
    "implicit": ImplicitSettings,
    "llm": LLMSettings,
    "human": HumanSettings,
}
# A judge's name is part of a file name.
_NAME = re.compile(r"(?!\.)[\w.-]{1,60}")


def judge_settings(name: str, values: Mapping[str, Any] | None) -> JudgeSettings:
    """The settings of one judge, checked without loading anything.

    Args:
        name: the kind of judge, or any name if `values` has a key `judge` with the kind.
        values: from a recipe or flags; None for the defaults.
    Raises:
        TokenRatioError: an unknown kind or setting, a name that is not allowed, or a required
            setting that is missing.
    """
    if not isinstance(values or {}, Mapping):
        raise TokenRatioError(f"judge {name} must hold `key: value` lines")
    own = dict(values or {})
    kind = str(own.pop("judge", name))
    check_known([kind], JUDGES, "judge")
    if not _NAME.fullmatch(name):
        raise TokenRatioError(
            f"{name!r} cannot be a judge's name: use letters, digits, . _ and - only"
        )
    settings = JUDGES[kind]
    check_known(own, settings.__dataclass_fields__, f"key in judge {name}")
    for needed in settings.required:
        if not own.get(needed):
            raise TokenRatioError(f"judge {name} needs {needed}")
    return build(settings, own, f"judge {name}")
