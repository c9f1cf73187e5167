"""Drawing prompts from the splits of a world."""

import random
from collections.abc import Mapping, Sequence
from typing import TypeVar

from tokenratio.errors import TokenRatioError

T = TypeVar("T")


def draw_prompts(
    splits: Mapping[str, Sequence[T]], num: int, *, seed: int, split: str, world: str
) -> list[T]:
    """Prompts of one split, without replacement until it is exhausted, then again.

    The first k are the same for every `num`.
    """
    if split not in splits:
        raise TokenRatioError(f"no split {split!r} in the {world} world: {' or '.join(splits)}")
    rng = random.Random(f"prompts {split} {seed}")
    drawn: list[T] = []
    while len(drawn) < num:
        drawn += rng.sample(splits[split], len(splits[split]))
    return drawn[:num]
