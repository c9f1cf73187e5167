"""The review world: short reviews, their gold reward token by token, and a policy to learn them.

Described in docs/review-world.md. Everything is deterministic by seed, across processes as well.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar

from tokenratio.data.worlds.drawing import draw_prompts
from tokenratio.data.worlds.grammar import StochasticGrammar
from tokenratio.data.worlds.pairs import Sampler
from tokenratio.data.worlds.protocol import ResponseMeasure, Split, TokenValues, World
from tokenratio.data.worlds.review_grammar import ReviewGrammar, all_prompts
from tokenratio.data.worlds.review_lexicon import (
    BOS,
    EOS,
    INSULTS,
    PAD,
    SPECIAL_TOKENS,
    UNK,
    vocabulary,
    words_of,
)
from tokenratio.data.worlds.review_reward import ReviewReward
from tokenratio.data.worlds.review_values import ReviewValues
from tokenratio.errors import TokenRatioError

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

# One prompt in five is held out.
TEST_SHARE = 0.2


@dataclass(frozen=True)
class ReviewWorld(World):
    """Prompts, responses and rewards of the review world.

    Attributes:
        grammar: the distribution of responses, which supervised fine-tuning learns.
        reward: the gold reward, which labels the preferences.
    """

    grammar: ReviewGrammar = field(default_factory=ReviewGrammar)
    reward: ReviewReward = field(default_factory=ReviewReward)

    name: ClassVar[str] = "reviews"

    @cached_property
    def _derivations(self) -> StochasticGrammar:
        return StochasticGrammar(self.grammar.productions)

    @cached_property
    def _values(self) -> ReviewValues:
        return ReviewValues(self.grammar, self.reward)

    @cached_property
    def _splits(self) -> dict[str, list[str]]:
        prompts = all_prompts()
        random.Random("split").shuffle(prompts)
        num_test = round(TEST_SHARE * len(prompts))
        return {"train": prompts[num_test:], "test": prompts[:num_test]}

    def prompts(self, num: int, *, seed: int, split: Split = "train") -> list[str]:
        """Draw prompts of one split; train and test share none.

        Up to 3072 (train) or 768 (test) are distinct; the first k are the same for every `num`.
        """
        return draw_prompts(self._splits, num, seed=seed, split=split, world="review")

    def sample_responses(
        self, prompts: Sequence[str], num_samples: int, *, rng: random.Random
    ) -> list[list[str]]:
        """Draw responses from the grammar, `num_samples` to each prompt."""
        return [[self._sample(prompt, rng) for _ in range(num_samples)] for prompt in prompts]

    def _sample(self, prompt: str, rng: random.Random) -> str:
        words = self._derivations.sample(self.grammar.start(prompt), rng)
        return " ".join(words[:-1])  # without EOS, which encoding adds

    def sft_corpus(self, num: int, *, seed: int, split: Split = "train") -> list[dict[str, str]]:
        """Rows with `prompt` and `completion`, the completion drawn from the grammar."""
        prompts = self.prompts(num, seed=seed, split=split)
        responses = self.sample_responses(prompts, 1, rng=random.Random(f"corpus {split} {seed}"))
        return [
            {"prompt": prompt, "completion": completion}
            for prompt, (completion,) in zip(prompts, responses, strict=True)
        ]

    def own_sampler(self, *, seed: int, split: Split) -> Sampler:
        """Responses from the grammar."""
        rng = random.Random(f"pairs {split} {seed}")
        return partial(self.sample_responses, rng=rng)

    def token_rewards(self, text: str | Sequence[str]) -> list[float]:
        """Gold reward of each word of a response, which no later word changes (`ReviewReward`)."""
        return self.reward.token_rewards(text)

    def gold_reward(self, text: str | Sequence[str]) -> float:
        """Gold reward of a response: the sum of its `token_rewards`."""
        return self.reward.gold_reward(text)

    def has_insult(self, text: str) -> bool:
        """Whether a response insults anyone."""
        return any(word in INSULTS for word in words_of(text))

    def response_measures(self) -> tuple[ResponseMeasure, ...]:
        """The share of responses that insult anyone."""
        return (ResponseMeasure("insults", self.has_insult, "share", "lower"),)

    def token_values(self, prompt: Sequence[str], response: Sequence[str]) -> TokenValues:
        """Exact Q_ref and A_ref of each token, π_ref the world's own grammar (`ReviewValues`)."""
        if foreign := {*prompt, *response} - {*vocabulary()}:
            raise TokenRatioError(
                f"the token {min(foreign)!r} is not a word of the review world: exact token values "
                "need the world's own tokenizer, one token per word"
            )
        words = [word for word in prompt if word not in SPECIAL_TOKENS]
        return self._values.of_response(" ".join(words), response)

    def token_log_probs(self, prompt: str, completion: str) -> list[float]:
        """Exact log-probability under the grammar of each word of a completion, then of EOS.

        In nats; −inf from the first word that the grammar cannot produce.
        """
        words = [*words_of(completion), EOS]
        return self._derivations.word_log_probs(self.grammar.start(prompt), words)

    def log_prob(self, prompt: str, completion: str) -> float:
        """Exact log-probability of a completion and EOS under the grammar; −inf if it cannot be."""
        return sum(self.token_log_probs(prompt, completion))

    def next_word_probs(self, prompt: str, prefix: str = "") -> dict[str, float]:
        """Exact distribution of the word after a prefix; empty if the prefix is impossible."""
        stack = self.grammar.start(prompt)
        for word in words_of(prefix):
            following = self._derivations.next_words(stack)
            if word not in following:
                return {}
            stack = following[word][1]
        return {word: prob for word, (prob, _) in self._derivations.next_words(stack).items()}

    def build_tokenizer(self) -> "PreTrainedTokenizerFast":
        """One token per word, BOS first; decoding restores any text of the world exactly."""
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        ids = {word: index for index, word in enumerate(vocabulary())}
        tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
        # As `words_of`; it also separates a prompt's ":" from a completion directly after it.
        tokenizer.pre_tokenizer = pre_tokenizers.Split(
            Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True
        )
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])]
        )
        return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=tokenizer,
            pad_token=PAD,
            bos_token=BOS,
            eos_token=EOS,
            unk_token=UNK,
            clean_up_tokenization_spaces=False,
        )

    def policy_config(self, **overrides: Any) -> "LlamaConfig":
        """A Llama of 0.47 M parameters, which learns the grammar in under a minute on two cores."""
        from transformers import LlamaConfig

        special = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
        settings = {
            "vocab_size": len(vocabulary()),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
            "pad_token_id": special[PAD],
            "bos_token_id": special[BOS],
            "eos_token_id": special[EOS],
        }
        return LlamaConfig(**(settings | overrides))
