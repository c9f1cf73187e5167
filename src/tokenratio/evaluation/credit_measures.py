"""Credit as measures: a policy's token scores compared with what its world knows of tokens."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from tokenratio.data import PreparedData
from tokenratio.data.worlds import WordValue, World
from tokenratio.evaluation.credit import StateTerm, credit, scores_by_term
from tokenratio.evaluation.inputs import LoadedPolicy
from tokenratio.evaluation.results import Measure
from tokenratio.models.token_rows import TokenRow

Array = NDArray[np.float64]
Target = Literal["action_value", "advantage"]
# The prefix of the measures: exact values, or the contributions of words.
Group = Literal["credit", "word_credit"]
_SIDES = ("chosen", "rejected")


def measure_credit(
    policy: LoadedPolicy,
    data: PreparedData,
    *,
    world: World,
    beta: float,
    baseline: Callable[..., Any] | None,
) -> list[Measure]:
    """Rank correlations of β·(log-ratio + state term) with what a world knows of each token.

    `credit/…` compares with exact values, which are those under the world's own distribution. The
    reference has learned it but does not equal it: even the best policy falls a little short of 1.

    `word_credit/…` is for worlds that know only how much each word contributes to the reward of its
    text. That is not an action value: a token that makes praise likely later on earns nothing.

    Args:
        baseline: the policy's learned b(s), whose scores are compared with action values; the
            others are compared with advantages.
    Raises:
        TokenRatioError: the world knows nothing of these tokens (another tokenizer, a foreign
            prompt), or what `token_scores` and `credit` refuse.
    """
    rows = [
        TokenRow(tuple(row["prompt_ids"]), tuple(row[f"{side}_ids"]))
        for row in data.dataset
        for side in _SIDES
    ]
    group, true = true_values(world, policy.tokenizer, rows)
    terms: list[StateTerm] = ["none", "kl"] if baseline is None else ["none", "kl", "baseline"]
    scores_of = scores_by_term(
        policy.model,
        policy.ref_model,
        rows,
        beta=beta,
        state_terms=terms,
        baseline=baseline,
        batch_size=policy.batch_size,
    )
    measures = []
    for term, scores in zip(terms, scores_of, strict=True):
        target: Target = "action_value" if term == "baseline" else "advantage"
        found = credit(scores, true[target], [row.prompt_ids for row in rows])
        name = "log_ratio" if term == "none" else f"log_ratio+{term}"
        measures += [
            Measure(
                f"{group}/{name}/{kind}",
                correlation.value,
                correlation.standard_error,
                found.num_tokens,
                "",
                "higher",
            )
            for kind, correlation in (
                ("spearman", found.spearman),
                ("spearman_within", found.spearman_within),
                ("kendall", found.kendall),
            )
        ]
    return measures


def true_values(
    world: World, tokenizer: PreTrainedTokenizerBase, rows: Sequence[TokenRow]
) -> tuple[Group, dict[Target, list[Array]]]:
    """What a world knows of each token of each response, and which kind of knowledge it is.

    Raises:
        TokenRatioError: the world knows nothing of these tokens.
    """
    of_words = _of_words(world, tokenizer, rows)
    if of_words is not None:
        return "word_credit", of_words
    return "credit", _exact(world, tokenizer, rows)


def _exact(
    world: World, tokenizer: PreTrainedTokenizerBase, rows: Sequence[TokenRow]
) -> dict[Target, list[Array]]:
    words = tokenizer.convert_ids_to_tokens
    values = [
        world.token_values(words(list(row.prompt_ids)), words(list(row.response_ids)))
        for row in rows
    ]
    return {
        "action_value": [each.action_value for each in values],
        "advantage": [each.advantage for each in values],
    }


def _of_words(
    world: World, tokenizer: PreTrainedTokenizerBase, rows: Sequence[TokenRow]
) -> dict[Target, list[Array]] | None:
    if world.word_values("") is None:
        return None
    values = []
    for row in rows:
        text, ends = decoded_ends(tokenizer, row.response_ids)
        words = world.word_values(text)
        assert words is not None
        values.append(values_of_tokens(words, ends))
    return {"action_value": values, "advantage": values}


def decoded_ends(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, list[int]]:
    """A response's text without special tokens, and where the text of each of its tokens ends.

    A token that adds no text (EOS, a part of a character) ends where the one before it does.
    """
    texts = [
        str(
            tokenizer.decode(
                list(ids[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
        for end in range(1, len(ids) + 1)
    ]
    return (texts[-1] if texts else ""), [len(text) for text in texts]


def values_of_tokens(words: Sequence[WordValue], ends: Sequence[int]) -> Array:
    """The value of the word that each token is a part of.

    All tokens of a word have its value; a token with parts of several has their sum; 0 for
    a token between words, nan for one without text.
    """
    values, start = np.zeros(len(ends)), 0
    for index, end in enumerate(ends):
        if end <= start:
            values[index] = np.nan
            continue
        values[index] = sum(word.value for word in words if word.start < end and start < word.end)
        start = end
    return values
