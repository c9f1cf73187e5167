"""Worlds of conversations: prompts and a reward; the responses are a policy's."""

from collections.abc import Sequence
from typing import Any, ClassVar

from tokenratio.data.worlds import pairs
from tokenratio.data.worlds.pairs import Sampler, WorldPrompt
from tokenratio.data.worlds.protocol import Split, World
from tokenratio.errors import TokenRatioError


class ChatWorld(World):
    """A world whose prompts are messages, so that any chat model's template applies to them.

    Attributes:
        name: as in `world:NAME`.
    """

    name: ClassVar[str]
    has_responses: ClassVar[bool] = False

    def prompts(
        self, num: int, *, seed: int, split: Split = "train", **own: str
    ) -> Sequence[WorldPrompt]:
        """Draw prompts of one split, each a conversation; `own` are options of this world."""
        raise NotImplementedError

    def preference_pairs(
        self,
        num: int,
        *,
        seed: int,
        temperature: float = 1.0,
        flip_rate: float = 0.0,
        split: Split = "train",
        sampler: Sampler | None = None,
        **own: str,
    ) -> list[dict[str, Any]]:
        """Pairs of a policy's responses, labelled by Bradley–Terry on the gold reward.

        Args:
            temperature: of the labels, in units of reward; small is decisive.
            flip_rate: probability that a label is reversed.
            sampler: the policy, such as `models.generation.policy_sampler`.
        Raises:
            TokenRatioError: there is no sampler, or a package that the reward needs is missing.
        """
        if sampler is None:
            raise TokenRatioError(
                f"world:{self.name} has no responses of its own: its pairs come from a policy. "
                "`tokenratio train` and `evaluate` draw them; in Python, pass a sampler "
                "to world_rows, such as policy_sampler(model, tokenizer, ...)"
            )
        self.require()
        return pairs.preference_pairs(
            self.prompts(num, seed=seed, split=split, **own),
            sampler,
            self.gold_reward,
            seed=seed,
            temperature=temperature,
            flip_rate=flip_rate,
        )
