"""The judge that knows the reward of a world."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.judges.protocol import JudgeContext, ResponsePair, Verdict
from tokenratio.settings import option


@dataclass(frozen=True)
class GoldSettings:
    """The reward of a world."""

    required: ClassVar[tuple[str, ...]] = ()

    world: str | None = option(
        None, "The world: reviews, sentiment or harmlessness. Default: that of the prompts."
    )

    def make(self, context: JudgeContext) -> "GoldJudge":
        from tokenratio.data.worlds import is_world_source

        world = self.world or context.world
        if world is None or (self.world is None and not is_world_source(world)):
            raise TokenRatioError("judge gold needs world, since the prompts do not come from one")
        return GoldJudge.of_world(world)


class GoldJudge:
    """The response with the higher reward is better, whatever the margin; equal rewards tie.

    Args:
        reward_fn: returns the reward of a response's text.
        name: the reward's name, for digests.
    """

    order_matters = False

    def __init__(self, reward_fn: Callable[[str], float], name: str) -> None:
        self._reward_fn, self._name = reward_fn, name

    @classmethod
    def of_world(cls, name: str) -> "GoldJudge":
        """The judge of a world, given by its name or a data source of it."""
        from tokenratio.data.worlds import world_of

        source = name if name.startswith("world:") else f"world:{name}"
        world = world_of(source)
        world.require()
        return cls(world.gold_reward, source.partition("?")[0])

    def identity(self) -> dict[str, Any]:
        return {"judge": "gold", "reward": self._name}

    def __call__(self, comparisons: Sequence[ResponsePair]) -> Iterator[Verdict]:
        for comparison in comparisons:
            a, b = (self._reward_fn(r.text) for r in (comparison.response_a, comparison.response_b))
            if math.isnan(a) or math.isnan(b):
                yield Verdict(None, "a reward is nan")
            else:
                yield Verdict(0.5 if a == b else float(a > b))
