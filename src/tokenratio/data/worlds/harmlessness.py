"""The harmlessness world: HH's prompts, any chat model's answers, a profanity classifier's reward.

Described in docs/sentiment-world.md.
"""

import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from tokenratio.data.worlds.drawing import draw_prompts
from tokenratio.data.worlds.pairs import WorldPrompt
from tokenratio.data.worlds.protocol import ResponseMeasure, Split, World
from tokenratio.errors import TokenRatioError

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class HarmlessnessWorld(World):
    """Prompts of a file that the user names, and a reward for answers without profanity.

    Attributes:
        scale: the reward is cut at ± this many nats, which is the classifier's resolution.
    """

    scale: float = 7.0

    name: ClassVar[str] = "harmlessness"
    has_responses: ClassVar[bool] = False
    own_options: ClassVar[tuple[str, ...]] = ("file",)

    def prompts(
        self, num: int, *, seed: int, split: Split = "train", **own: str
    ) -> list[WorldPrompt]:
        """Draw different prompts of the source `file`, of one split if it has several.

        When all have been drawn, they are drawn again.

        Raises:
            TokenRatioError: `file` is not given, cannot be read, or has a row without a prompt.
        """
        if not own.get("file"):
            raise TokenRatioError(
                "world:harmlessness has no prompts of its own: add file=PATH, a source with HH's "
                "layout, such as world:harmlessness?prompts=200&file=hh/test.jsonl"
            )
        found: dict[str, list[WorldPrompt]] = {split: _conversations(own["file"], split)}
        return draw_prompts(found, num, seed=seed, split=split, world=self.name)

    def require(self) -> None:
        """Raise `TokenRatioError` if `alt-profanity-check` is missing or does not load."""
        _classifier()

    def gold_reward(self, text: str) -> float:
        """The log-odds, in nats, that the classifier finds a text clean; cut at ± `scale`."""
        prob = self.profanity(text)
        odds = (1 - prob) / prob if prob else math.inf
        return max(-self.scale, min(self.scale, math.log(odds) if odds else -math.inf))

    def profanity(self, text: str) -> float:
        """The classifier's probability that a text is profane or offensive."""
        (prob,) = _classifier()([text])
        return float(prob)

    def response_measures(self) -> tuple[ResponseMeasure, ...]:
        """The share of responses that the classifier calls profane."""
        return (
            ResponseMeasure("profane", lambda text: self.profanity(text) > 0.5, "share", "lower"),
        )


def _conversations(source: str, split: str) -> list[WorldPrompt]:
    """The different prompts of a source as messages, in its order."""
    from tokenratio.data.prompts import read_prompts  # it reads worlds, too

    found: dict[str, WorldPrompt] = {}
    for origin, prompt in read_prompts(source, split=split):
        messages = (
            _turns(prompt) if isinstance(prompt, str) else [dict(each) for each in prompt.messages]
        )
        if not messages or messages[-1]["role"] != "user":
            raise TokenRatioError(
                f"{origin}: the prompt does not end with a turn of the user (Human:), so there is "
                "nothing to answer"
            )
        found.setdefault(str(messages), messages)
    return list(found.values())


def _turns(text: str) -> list[dict[str, str]]:
    r"""The messages of a transcript; any other text is one turn of the user.

    >>> _turns("\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:")[1:]
    [{'role': 'assistant', 'content': 'Hello'}, {'role': 'user', 'content': 'Why?'}]
    """
    before, *parts = _TURN.split(text)
    if before.strip() or not parts:  # an instruction that quotes a transcript is no transcript
        return [{"role": "user", "content": text.strip()}] if text.strip() else []
    speakers = zip(parts[::2], parts[1::2], strict=True)
    turns = [{"role": _ROLES[who], "content": said.strip()} for who, said in speakers]
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


@lru_cache(maxsize=1)
def _classifier() -> Callable[[Sequence[str]], Any]:
    """`profanity_check.predict_prob`: a linear model of words, in files of the package itself.

    Raises:
        TokenRatioError: it is missing, or made for another version of scikit-learn.
    """
    from sklearn.exceptions import InconsistentVersionWarning

    try:
        with warnings.catch_warnings():
            # Saved by another version of scikit-learn, the model may give other answers.
            warnings.simplefilter("error", InconsistentVersionWarning)
            from profanity_check import predict_prob
    except ImportError:
        raise TokenRatioError(
            "world:harmlessness needs the package alt-profanity-check: "
            "pip install 'tokenratio[worlds]'"
        ) from None
    except Exception as error:
        raise TokenRatioError(
            f"alt-profanity-check cannot be loaded ({type(error).__name__}): install the version "
            "that goes with your scikit-learn, pip install 'tokenratio[worlds]'"
        ) from error
    return predict_prob  # type: ignore[no-any-return]
