"""The interface of a synthetic world: prompts, pairs, a gold reward, optional measures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenratio.data.worlds import pairs
from tokenratio.data.worlds.pairs import Sampler, WorldPrompt
from tokenratio.errors import TokenRatioError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

Split = Literal["train", "test"]


@dataclass(frozen=True)
class TokenValues:
    """The exact value of each token of a response, in units of the reward.

    Attributes:
        action_value: Q_ref(s_t, a_t), the token's reward plus the expected sum of the later ones.
        advantage: A_ref(s_t, a_t) = Q_ref(s_t, a_t) − V_ref(s_t).
    """

    action_value: NDArray[np.float64]
    advantage: NDArray[np.float64]


@dataclass(frozen=True)
class WordValue:
    """A word of a text and what it contributes to the reward of that text.

    Attributes:
        start, end: of the word in the text, in characters.
        value: its contribution, on a scale that may differ from text to text.
    """

    start: int
    end: int
    value: float


@dataclass(frozen=True)
class ResponseMeasure:
    """A measure of one response that a world defines besides its gold reward.

    Attributes:
        name: what tables call it.
        of: from a response's text to the figure; averaged over responses.
        unit: of the figure, such as "share".
        better: which direction is better.
    """

    name: str
    of: Callable[[str], float]
    unit: str
    better: Literal["higher", "lower"]


class World(Protocol):
    """A world. A class that derives from this inherits the optional parts.

    Attributes:
        name: as in `world:NAME`.
        own_options: options of its sources besides those of every world, passed on as texts.
        has_responses: pairs can be drawn without a sampler.
    """

    name: ClassVar[str]
    own_options: ClassVar[tuple[str, ...]] = ()
    has_responses: ClassVar[bool] = True

    def prompts(self, num: int, *, seed: int, split: Split = ...) -> Sequence[WorldPrompt]: ...

    def gold_reward(self, text: str) -> float: ...

    # The rest is optional.

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
        """Pairs of responses labelled by Bradley–Terry on the gold reward (see `worlds.pairs`).

        Args:
            temperature: of the labels, in units of reward; small is decisive.
            flip_rate: probability that a label is reversed.
            sampler: where responses come from, such as `models.generation.policy_sampler`; the
                world's own distribution if None.
            own: options of this world.
        Raises:
            TokenRatioError: there is no sampler and the world has no responses of its own, or a
                package that the reward needs is missing.
        """
        sampler = sampler or self.own_sampler(seed=seed, split=split)
        self.require()
        draw: Any = self.prompts  # only some worlds have options
        return pairs.preference_pairs(
            draw(num, seed=seed, split=split, **own),
            sampler,
            self.gold_reward,
            seed=seed,
            temperature=temperature,
            flip_rate=flip_rate,
        )

    def own_sampler(self, *, seed: int, split: Split) -> Sampler:
        """Responses from the world's own distribution, if it has one."""
        raise TokenRatioError(
            f"world:{self.name} has no responses of its own: its pairs come from a policy. "
            "`tokenratio train` and `evaluate` draw them; in Python, pass a sampler "
            "to world_rows, such as policy_sampler(model, tokenizer, ...)"
        )

    def require(self) -> None:
        """Raise `TokenRatioError` if a package that the reward needs is missing."""
        return

    def sft_corpus(self, num: int, *, seed: int, split: Split = "train") -> list[dict[str, str]]:
        """Rows with prompt and completion, if the world has responses of its own."""
        raise TokenRatioError(
            "this world has no responses of its own, so no corpus: its sources "
            "are pairs and prompts"
        )

    def build_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer of a policy that learns the world from nothing."""
        raise TokenRatioError("this world has no tokenizer: name that of the policy")

    def policy_config(self, **overrides: Any) -> "PretrainedConfig":
        """The configuration of a policy that learns the world from nothing."""
        raise TokenRatioError("this world has no policy of its own: name a chat model")

    def response_measures(self) -> tuple[ResponseMeasure, ...]:
        """Measures of a response besides its gold reward; none by default."""
        return ()

    def token_values(self, prompt: Sequence[str], response: Sequence[str]) -> TokenValues:
        """The exact value of each token of a response; nan in states that π_ref never reaches.

        Args:
            prompt, response: as the world's tokenizer splits them, special tokens included.
        Raises:
            TokenRatioError: the world has no exact values (the default), or a token is foreign.
        """
        raise TokenRatioError("this world has no exact token values")

    def word_values(self, text: str) -> list[WordValue] | None:
        """The words of a text with their contributions to its reward, for worlds without exact
        token values; None (the default) if the reward is not a sum over words.
        """
        return None
