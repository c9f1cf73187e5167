"""How varied a policy's samples are (docs/method.md §8).

Each measure takes the samples of every prompt and gives a value per prompt and their mean. A sample
is a text, split into tokens as sacrebleu's "13a" does, or a sequence of token ids, which are its
tokens as they are (for languages "13a" does not split).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from torch import Tensor, nn

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.estimates import Estimate, clustered_mean
from tokenratio.models.token_requests import own_head
from tokenratio.models.token_rows import TokenRow, hidden_states, score_rows
from tokenratio.statistics.chunks import default_chunk_size
from tokenratio.statistics.head import Head, compute_dtype, product_dtype
from tokenratio.types import CompletionBatch

Text = str | Sequence[int]
Tokens = tuple[str, ...]

# The orders averaged in the kernel of the Vendi score, as in the code of its authors.
VENDI_ORDERS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Diversity:
    """A measure of diversity.

    Attributes:
        per_prompt: its value for each prompt, in the prompts' order; nan where it is not defined (a
            response too short to have an n-gram).
        estimate: the mean of those that are defined; `num` says how many were averaged: prompts, or
            responses for `predictive_entropy`. nan if there are none.
        num_undefined: prompts, or responses for `predictive_entropy`, that were left out.
    """

    per_prompt: tuple[float, ...]
    estimate: Estimate
    num_undefined: int


def self_bleu(samples: Sequence[Sequence[Text]]) -> Diversity:
    """Mean sentence BLEU over ordered pairs of a prompt's samples, 0 to 100; lower is more diverse.

    sacrebleu's, nrefs:1|case:mixed|eff:yes|tok:13a|smooth:exp. Samples with the same tokens score
    exactly 100, two empty ones too.

    Args:
        samples: for each prompt at least two.
    Raises:
        TokenRatioError: no prompts, or a prompt with fewer samples.

    >>> self_bleu([["the room was good .", "the room was good ."]]).estimate.mean
    100.0
    """
    # Effective order: a response of two words is not scored by 4-grams it cannot have. The tokens
    # are split already; `force` only silences the remark that texts look it.
    bleu = BLEU(effective_order=True, smooth_method="exp", tokenize="none", force=True)

    def score(group: list[Tokens]) -> float:
        texts = [" ".join(tokens) for tokens in group]
        scores = [
            # by hand: sacrebleu gives 100.00000000000004, and 0 for empty texts
            100.0 if one == other else min(100.0, bleu.sentence_score(one, [other]).score)
            for i, one in enumerate(texts)
            for j, other in enumerate(texts)
            if i != j
        ]
        return math.fsum(scores) / len(scores)

    return _over_prompts([score(group) for group in _tokenised(samples, at_least=2)])


def distinct_in_response(samples: Sequence[Sequence[Text]], n: int) -> Diversity:
    """Distinct-n of one sample per prompt, the first: different n-grams over n-grams, 0 to 1.

    docs/method.md §8's Distinct-1, read as a mean over responses; `distinct_in_corpus` is the other
    reading. A response that repeats itself scores low; short ones score high.

    >>> distinct_in_response([["so so good", "a second sample does not count"]], 1).per_prompt
    (0.6666666666666666,)
    """
    groups = _tokenised(samples, at_least=1)
    return _over_prompts([_distinct(group[:1], n) for group in groups])


def distinct_in_prompt(samples: Sequence[Sequence[Text]], n: int) -> Diversity:
    """Distinct-n of all of a prompt's samples together: low if they share their n-grams.

    Falls as there are more samples per prompt: compare policies with as many each.

    >>> distinct_in_prompt([["good room", "good bed"]], 1).per_prompt
    (0.75,)
    """
    return _over_prompts([_distinct(group, n) for group in _tokenised(samples, at_least=1)])


def distinct_in_corpus(samples: Sequence[Sequence[Text]], n: int) -> Estimate:
    """Distinct-n of the prompts' first samples together, as Li et al. define it (1510.03055).

    Falls as there are more prompts and longer responses: compare policies on the same prompts. The
    standard error is a jackknife over prompts, which errs on the large side for such a count; `num`
    counts prompts.
    """
    counts = [_ngrams(group[0], n) for group in _tokenised(samples, at_least=1)]
    holders = Counter(ngram for of_prompt in counts for ngram in of_prompt)
    total, num = sum(map(Counter.total, counts)), len(counts)
    if not total:
        return Estimate(math.nan, math.nan, num)
    without = [
        (len(holders) - sum(holders[ngram] == 1 for ngram in of_prompt))
        / (total - of_prompt.total())
        for of_prompt in counts
        if of_prompt.total() < total
    ]
    error = math.nan  # one prompt, or n-grams in only one
    if len(without) == num > 1:
        error = math.sqrt((num - 1) * float(np.var(without)))
    return Estimate(len(holders) / total, error, num)


def vendi_score(samples: Sequence[Sequence[Text]]) -> Diversity:
    """How many different responses the k samples of a prompt amount to: 1 (alike) to k (disjoint).

    exp of the entropy of the eigenvalues of K / k (Friedman and Dieng, 2210.02410), K the mean over
    n = 1 … 4 of the cosine similarities of n-gram counts. A response of fewer than n tokens counts
    as one n-gram of its own.

    >>> vendi_score([["good room", "good room", "bad bed"]]).per_prompt
    (1.8898815748423097,)
    """
    return _over_prompts([_vendi(group) for group in _tokenised(samples, at_least=1)])


def predictive_entropy(
    model: nn.Module,
    samples: Sequence[Sequence[TokenRow]],
    *,
    batch_size: int = 16,
    chunk_size: int | None = None,
) -> Diversity:
    """Mean token entropy of the policy on its samples, nats; higher is more diverse.

    docs/method.md §8.

    The states are those of the samples, whatever backend they come from; at each the entropy is
    that of the policy's whole distribution at temperature 1. A response's value is the mean over
    its tokens, EOS included.

    Args:
        batch_size: rows in one forward pass.
        chunk_size: tokens whose logits are held at once, in float32 at least; chosen from the
            vocabulary if None.
    Raises:
        TokenRatioError: see `score_rows`.
    """
    rows = [sample for group in samples for sample in group]

    def mean_entropies(batch: CompletionBatch) -> list[float]:
        of_tokens = _entropies(hidden_states(model, batch), own_head(model), chunk_size)
        sums = batch.align(of_tokens).double().sum(-1)
        return (sums / batch.response_mask.sum(-1)).tolist()

    entropies = np.array(score_rows([model], rows, mean_entropies, batch_size=batch_size))
    sizes = [len(group) for group in samples]
    ends = np.cumsum(sizes)
    groups = [entropies[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    defined = [group[~np.isnan(group)] for group in groups]
    per_prompt = [float(group.mean()) if len(group) else math.nan for group in defined]
    kept = [len(group) for group in defined]
    mean = Estimate(math.nan, math.nan, 0)
    if any(kept):
        mean = clustered_mean(np.concatenate(defined).tolist(), kept)
    return Diversity(tuple(per_prompt), mean, len(rows) - sum(kept))


def _entropies(
    hidden: Float[Tensor, "tokens hidden"], head: Head, chunk_size: int | None
) -> Float[Tensor, "tokens"]:
    """Entropy of softmax(head(hidden)) in nats; no more than one chunk's logits at once."""
    vocabulary = len(head.weight)
    chunk_size = chunk_size or default_chunk_size(vocabulary, hidden.device.type)
    dtype = compute_dtype(hidden, head.weight)
    factors = product_dtype(dtype, head.weight)
    head = head.to(factors)
    entropies = hidden.new_empty(len(hidden), dtype=dtype)
    space = hidden.new_empty(min(chunk_size, len(hidden)), vocabulary, dtype=dtype)
    for start in range(0, len(hidden), chunk_size):
        states = slice(start, start + chunk_size)
        logits = head.write_logits(hidden[states].to(factors), space)
        # `entr` is 0 where a probability is, which log-probabilities of −inf would make nan
        entropies[states] = torch.special.entr(logits.softmax(-1)).sum(-1)
    return entropies


def _over_prompts(values: Sequence[float]) -> Diversity:
    defined = [value for value in values if not math.isnan(value)]
    mean = Estimate(math.nan, math.nan, 0)
    if defined:
        mean = clustered_mean(defined, [1] * len(defined))
    return Diversity(tuple(values), mean, len(values) - len(defined))


def _tokenised(samples: Sequence[Sequence[Text]], *, at_least: int) -> list[list[Tokens]]:
    if not samples:
        raise TokenRatioError("no prompts: there is no diversity to measure")
    for index, group in enumerate(samples):
        if len(group) < at_least:
            raise TokenRatioError(
                f"prompt {index} has {len(group)} samples, at least {at_least} are needed: sample "
                "more to each prompt"
            )
    return [[_tokens(sample) for sample in group] for group in samples]


def _tokens(sample: Text) -> Tokens:
    if isinstance(sample, str):
        return tuple(_tokenizer()(sample.rstrip()).split())
    return tuple(map(str, sample))


@lru_cache(maxsize=1)
def _tokenizer() -> Tokenizer13a:
    return Tokenizer13a()  # type: ignore[no-untyped-call]


def _ngrams(tokens: Tokens, n: int) -> Counter[Tokens]:
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    return Counter(tokens[i : i + n] for i in range(len(tokens) - n + 1))


def _distinct(group: Sequence[Tokens], n: int) -> float:
    counts: Counter[Tokens] = sum((_ngrams(tokens, n) for tokens in group), Counter())
    return len(counts) / counts.total() if counts else math.nan


def _vendi(group: Sequence[Tokens]) -> float:
    kernel = np.mean([_cosines(group, n) for n in VENDI_ORDERS], axis=0)
    eigenvalues = np.linalg.eigvalsh(kernel).clip(min=0.0)
    eigenvalues /= eigenvalues.sum()  # their sum, the kernel's trace, is k but for rounding
    positive = eigenvalues[eigenvalues > 0]
    score = math.exp(-float(positive @ np.log(positive)))
    return min(max(score, 1.0), float(len(group)))  # the bounds hold but for rounding


def _cosines(group: Sequence[Tokens], n: int) -> NDArray[np.float64]:
    """[k, k], 1 on the diagonal, positive semi-definite."""
    counts = [_ngrams(tokens, n) if len(tokens) >= n else Counter([tokens]) for tokens in group]
    column = {ngram: i for i, ngram in enumerate(dict.fromkeys(ng for c in counts for ng in c))}
    table = np.zeros((len(group), len(column)))
    for row, of_sample in enumerate(counts):
        for ngram, count in of_sample.items():
            table[row, column[ngram]] = count
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    return table @ table.T
