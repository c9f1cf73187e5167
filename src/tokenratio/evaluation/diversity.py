"""How varied a policy's samples are (docs/method.md §8).

Each measure takes the samples of every prompt and returns a value per prompt, in the same order. A
sample is a text, split into tokens as sacrebleu's "13a" does, or a sequence of token ids, for
languages that "13a" does not split.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import permutations

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from torch import Tensor, nn

from tokenratio.errors import TokenRatioError
from tokenratio.models.token_requests import own_head
from tokenratio.models.token_rows import TokenRow, hidden_states, score_rows
from tokenratio.statistics.head import Head, compute_dtype
from tokenratio.statistics.predictions import entropy, logits_in_chunks
from tokenratio.types import CompletionBatch

Text = str | Sequence[int]
Tokens = tuple[str, ...]

# The orders averaged in the kernel of the Vendi score, as in the code of its authors.
VENDI_ORDERS = (1, 2, 3, 4)


def self_bleu(samples: Sequence[Sequence[Text]]) -> list[float]:
    """Mean sentence BLEU over ordered pairs of a prompt's samples, 0 to 100; lower is more diverse.

    sacrebleu's, nrefs:1|case:mixed|eff:yes|tok:13a|smooth:exp. Samples with the same tokens score
    exactly 100, as do two empty ones.

    Args:
        samples: for each prompt at least two.
    Raises:
        TokenRatioError: no prompts, or a prompt with fewer samples.

    >>> self_bleu([["the room was good .", "the room was good ."]])
    [100.0]
    """
    # Effective order: a response of two words is not scored by 4-grams it cannot have. `force`
    # silences the warning that the texts look tokenised, which they are.
    bleu = BLEU(effective_order=True, smooth_method="exp", tokenize="none", force=True)

    def score(group: list[Tokens]) -> float:
        texts = [" ".join(tokens) for tokens in group]
        scores = [
            # sacrebleu gives 100.00000000000004 for equal texts, and 0 for empty ones
            100.0 if one == other else min(100.0, bleu.sentence_score(one, [other]).score)
            for one, other in permutations(texts, 2)
        ]
        return math.fsum(scores) / len(scores)

    return [score(group) for group in _tokenised(samples, at_least=2)]


def distinct_in_response(samples: Sequence[Sequence[Text]], n: int) -> list[float]:
    """Distinct-n of each prompt's first sample: different n-grams over n-grams, 0 to 1.

    A response that repeats itself scores low; short ones score high; one without an n-gram is nan.

    >>> distinct_in_response([["so so good", "a second sample does not count"]], 1)
    [0.6666666666666666]
    """
    counts = [_ngrams(group[0], n) for group in _tokenised(samples, at_least=1)]
    return [len(count) / count.total() if count else math.nan for count in counts]


def vendi_score(samples: Sequence[Sequence[Text]]) -> list[float]:
    """The effective number of responses among a prompt's k samples: 1 (alike) to k (disjoint).

    exp of the entropy of the eigenvalues of K / k (Friedman and Dieng, 2210.02410), K the mean over
    n = 1 … 4 of the cosine similarities of n-gram counts. A response of fewer than n tokens counts
    as one n-gram of its own.

    >>> [round(score, 9) for score in vendi_score([["good room", "good room", "bad bed"]])]
    [1.889881575]
    """
    return [_vendi(group) for group in _tokenised(samples, at_least=1)]


def predictive_entropy(
    model: nn.Module,
    samples: Sequence[Sequence[TokenRow]],
    *,
    batch_size: int = 16,
    chunk_size: int | None = None,
) -> list[float]:
    """Mean token entropy of the policy on its samples, nats; higher is more diverse.

    The entropy at each state of the samples is that of the policy's whole distribution at
    temperature 1. A response's value is the mean over its tokens, EOS included; empty responses are
    left out, and a prompt without any other is nan.

    Args:
        batch_size: rows in one forward pass.
        chunk_size: tokens whose logits are held at once, in float32 or wider; chosen from the
            vocabulary's size if None.
    """
    rows = [sample for group in samples for sample in group]

    def mean_entropies(batch: CompletionBatch) -> list[float]:
        of_tokens = _entropies(hidden_states(model, batch), own_head(model), chunk_size)
        sums = batch.align(of_tokens).double().sum(-1)
        return (sums / batch.response_mask.sum(-1)).tolist()

    entropies = np.array(score_rows([model], rows, mean_entropies, batch_size=batch_size))
    groups = np.split(entropies, np.cumsum([len(group) for group in samples])[:-1])
    defined = [group[~np.isnan(group)] for group in groups]
    return [float(group.mean()) if len(group) else math.nan for group in defined]


def _entropies(
    hidden: Float[Tensor, "tokens hidden"], head: Head, chunk_size: int | None
) -> Float[Tensor, "tokens"]:
    entropies = hidden.new_empty(len(hidden), dtype=compute_dtype(hidden, head.weight))
    for states, logits in logits_in_chunks(hidden, head, chunk_size):
        entropies[states] = entropy(logits)
    return entropies


def _tokenised(samples: Sequence[Sequence[Text]], *, at_least: int) -> list[list[Tokens]]:
    if not samples:
        raise TokenRatioError("no prompts: there is no diversity to measure")
    for index, group in enumerate(samples):
        if len(group) < at_least:
            raise TokenRatioError(
                f"prompt {index} has {len(group)} samples; at least {at_least} are needed: sample "
                "more responses per prompt"
            )
    split = Tokenizer13a()  # type: ignore[no-untyped-call]
    return [
        [
            tuple(split(sample.rstrip()).split())
            if isinstance(sample, str)
            else tuple(map(str, sample))
            for sample in group
        ]
        for group in samples
    ]


def _ngrams(tokens: Tokens, n: int) -> Counter[Tokens]:
    return Counter(tokens[i : i + n] for i in range(len(tokens) - n + 1))


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
