"""The judge that knows: a reward that is given, as a world's is."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tokenratio.data.worlds import WORLDS
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.judges.protocol import ResponsePair, Verdict


class GoldJudge:
    """The response with the higher reward is better, whatever the margin; equal ones tie.

    Args:
        reward_fn: of a response's text.
        name: what the reward is called, for digests.
    """

    order_matters = False

    def __init__(self, reward_fn: Callable[[str], float], name: str) -> None:
        self._reward_fn, self._name = reward_fn, name

    @classmethod
    def of_world(cls, name: str) -> "GoldJudge":
        """The gold reward of a synthetic world.

        Raises:
            TokenRatioError: there is no such world.
        """
        if name not in WORLDS:
            raise TokenRatioError(f"no world {name!r}; there are: {', '.join(sorted(WORLDS))}")
        return cls(WORLDS[name].gold_reward, f"world:{name}")

    def identity(self) -> dict[str, Any]:
        return {"judge": "gold", "reward": self._name}

    def __call__(self, comparisons: Sequence[ResponsePair]) -> Iterator[Verdict]:
        for comparison in comparisons:
            a, b = (self._reward_fn(r.text) for r in (comparison.response_a, comparison.response_b))
            if math.isnan(a) or math.isnan(b):
                yield Verdict(None, "a reward is nan")
            else:
                yield Verdict(0.5 if a == b else float(a > b))
