"""The interface of a synthetic world: prompts, pairs, a gold reward, optional measures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenratio.data.worlds.pairs import Sampler
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
    """A world. A class that derives from this inherits the optional parts (the last two)."""

    def prompts(self, num: int, *, seed: int, split: Split = ...) -> list[str]: ...

    def sft_corpus(self, num: int, *, seed: int, split: Split = ...) -> list[dict[str, str]]: ...

    def preference_pairs(
        self,
        num: int,
        *,
        seed: int,
        temperature: float = ...,
        flip_rate: float = ...,
        split: Split = ...,
        sampler: Sampler | None = ...,
    ) -> list[dict[str, Any]]: ...

    def gold_reward(self, text: str) -> float: ...

    def build_tokenizer(self) -> "PreTrainedTokenizerBase": ...

    def policy_config(self, **overrides: Any) -> "PretrainedConfig": ...

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
