import math
import statistics
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.diversity import (
    _entropies,
    distinct_in_response,
    predictive_entropy,
    self_bleu,
    vendi_score,
)
from tokenratio.models.generation import encode_prompts, sample_responses
from tokenratio.models.token_rows import TokenRow
from tokenratio.statistics.head import Head

PROMPTS = ["review of the hotel :", "the", "note about the old camera for my boss :"]

WORDS = ["the", "room", "was", "not", "very", "good", ".", ",", "bed"]

exact = settings(deadline=None, derandomize=True)
texts = st.lists(st.sampled_from(WORDS), max_size=9)
groups = st.lists(texts.map(" ".join), min_size=2, max_size=5)


@exact
@given(st.text(), st.integers(2, 4), st.integers(1, 3))
def test_self_bleu_of_identical_samples_is_exactly_100(text, num_samples, num_prompts):
    assert self_bleu([[text] * num_samples] * num_prompts) == [100.0] * num_prompts


def test_self_bleu_of_disjoint_samples_is_0():
    assert self_bleu([["good room", "bad bed", "."]]) == [0.0]


@exact
@given(st.lists(groups, min_size=1, max_size=3))
def test_self_bleu_is_sacrebleus_over_ordered_pairs(samples):
    bleu = BLEU(effective_order=True)  # its own tokenizer, "13a"
    for group, value in zip(samples, self_bleu(samples), strict=True):
        pairs = [
            100.0 if one == other else bleu.sentence_score(one, [other]).score
            for one, other in permutations(group, 2)
        ]
        assert value == pytest.approx(statistics.mean(pairs), abs=1e-9)


def test_punctuation_is_a_token_of_its_own():
    assert self_bleu([["the room, was good.", "the room , was good ."]]) == [100.0]


def test_self_bleu_over_prompts():
    measured = self_bleu([["a b", "a b"], ["a b", "c d"], ["a b", "a b", "c d"]])
    assert measured == pytest.approx([100, 0, 100 / 3])


@pytest.mark.parametrize("measure", [self_bleu, vendi_score])
def test_token_ids_are_tokens(measure):
    """Ids of one text per word give what the words give."""
    ids = {word: index + 40_000 for index, word in enumerate("abcdef")}
    words = [["a b c d", "a b d c e"], ["a", "f f a"]]
    coded = [[[ids[word] for word in text.split()] for text in group] for group in words]
    assert measure(coded) == pytest.approx(measure(words))


def test_distinct_by_hand():
    samples = [["a a b", "a b c"], ["c", "c"], ["a a b a b", "c"]]
    assert distinct_in_response(samples, 1) == pytest.approx([2 / 3, 1, 2 / 5])
    assert distinct_in_response(samples, 2)[2] == pytest.approx(3 / 4)  # aa ab ba ab


def test_responses_without_an_ngram_are_nan():
    whole, *short = distinct_in_response([["a b"], ["c"], [""]], 2)
    assert whole == 1
    assert all(map(math.isnan, short))
    assert math.isnan(distinct_in_response([[""]], 1)[0])


@exact
@given(st.lists(texts.map(" ".join), min_size=1, max_size=6), st.integers(1, 2))
def test_distinct_counts_ngrams_of_the_first_sample(firsts, n):
    for text, value in zip(
        firsts, distinct_in_response([[text, "never counted"] for text in firsts], n), strict=True
    ):
        words = text.split()
        ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        expected = len(set(ngrams)) / len(ngrams) if ngrams else math.nan
        assert value == pytest.approx(expected, nan_ok=True)


@exact
@given(st.lists(texts.map(" ".join), min_size=1, max_size=6))
def test_vendi_lies_between_1_and_k(group):
    (value,) = vendi_score([group])
    assert 1 <= value <= len(group)
    doubled = vendi_score([group * 2])[0]
    assert doubled == pytest.approx(value)  # repetition adds nothing


@pytest.mark.parametrize("text", ["", "a", "a b c", "the room was good ."])
@pytest.mark.parametrize("num", [1, 2, 5])
def test_vendi_of_identical_samples_is_1(text, num):
    assert vendi_score([[text] * num])[0] == pytest.approx(1, abs=1e-12)


def test_vendi_of_disjoint_samples_is_k():
    disjoint = ["a", "b c", "d e f g h", "", "i i i i"]
    assert vendi_score([disjoint])[0] == pytest.approx(5)


def test_vendi_of_two_is_its_closed_form():
    """Two samples of similarity s: eigenvalues (1 ± s) / 2."""
    # cosines of the counts of n-grams, n = 1 … 4: 2/3, 1/2, 0, 0 (too short, and different)
    s = (2 / 3 + 1 / 2) / 4
    p = np.array([1 + s, 1 - s]) / 2
    expected = math.exp(-(p * np.log(p)).sum())
    assert vendi_score([["a b c", "a b d"]])[0] == pytest.approx(expected)


def test_more_alike_is_less_diverse():
    near = [["the room was good .", "the room was nice .", "the room was fine ."]]
    far = [["the room was good .", "we hated the pool .", "only a fool would choose the bed ."]]
    assert vendi_score(near)[0] < vendi_score(far)[0]
    assert self_bleu(near)[0] > self_bleu(far)[0]


@pytest.mark.parametrize(
    ("measure", "samples", "message"),
    [
        (self_bleu, [["a", "b"], ["a"]], "prompt 1 has 1 samples; at least 2"),
        (vendi_score, [[]], "prompt 0 has 0 samples; at least 1"),
        (vendi_score, [], "no prompts"),
    ],
)
def test_too_few_samples(measure, samples, message):
    with pytest.raises(TokenRatioError, match=message):
        measure(samples)


def entropy_by_hand(model, sample):
    """A response's mean token entropy, token by token in float64."""
    entropies = []
    for t in range(len(sample.response_ids)):
        state = torch.tensor([sample.prompt_ids + sample.response_ids[:t]])
        with torch.no_grad():
            p = model(state).logits[0, -1].double().softmax(-1)
        entropies.append(-(p * p.log()).sum().item())
    return statistics.mean(entropies)


@pytest.fixture
def policy(make_policy):
    return make_policy(0)


@pytest.fixture
def samples(policy, tokenizer):
    drawn = sample_responses(policy, tokenizer, PROMPTS, num_samples=3, max_new_tokens=9, seed=0)
    kept = zip(encode_prompts(tokenizer, PROMPTS), [drawn[0], drawn[1][:1], drawn[2]], strict=True)
    return [[TokenRow(ids, response.token_ids) for response in group] for ids, group in kept]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("chunk_size", [1, 7, None])
def test_entropy_against_a_hand_loop(policy, samples, batch_size, chunk_size):
    measured = predictive_entropy(policy, samples, batch_size=batch_size, chunk_size=chunk_size)
    policy.eval()
    values = [[entropy_by_hand(policy, sample) for sample in group] for group in samples]
    assert measured == pytest.approx([statistics.mean(v) for v in values], rel=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "phi", "gpt2"])
def test_entropy_with_soft_cap_bias_and_absolute_positions(family):
    from tiny import tiny_model

    model = tiny_model(family).eval()
    rows = [TokenRow((1, 5), (6, 7, 8, 2)), TokenRow((1, 9, 4), (11,))]
    values = [entropy_by_hand(model, row) for row in rows]
    measured = predictive_entropy(model, [[row] for row in rows], batch_size=2)
    assert measured == pytest.approx(values, rel=1e-5)


def test_entropy_holds_no_more_logits_than_a_chunk(policy, samples, monkeypatch):
    from tokenratio.models import token_requests

    held = []

    class Watched(token_requests.Head):
        def write_logits(self, hidden, out):
            held.append(out.shape[0])
            return super().write_logits(hidden, out)

        def to(self, dtype):
            head = super().to(dtype)
            return Watched(head.weight, head.bias, head.softcap)

    monkeypatch.setattr(token_requests, "Head", Watched)
    predictive_entropy(policy, samples, chunk_size=5)
    assert held
    assert max(held) == 5


def test_an_empty_response_is_left_out(policy):
    empty, whole = TokenRow((1, 5), ()), TokenRow((1, 5), (6, 2))
    both, alone, only_empty = predictive_entropy(policy, [[empty, whole], [whole], [empty]])
    assert both == pytest.approx(alone, rel=1e-6)
    assert math.isnan(only_empty)


def test_masked_tokens_do_not_make_the_entropy_nan():
    """A vocabulary padded with impossible tokens has logits of −inf."""
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, -math.inf])
    hidden = torch.ones(3, 4)
    masked = _entropies(hidden, Head(weight, bias, None), None)
    assert torch.allclose(masked, _entropies(hidden, Head(weight[:5], bias[:5], None), 2))


def test_entropy_leaves_the_mode_and_names_the_fault(policy, samples):
    policy.train()
    policy.model.layers[0].eval()
    predictive_entropy(policy, samples)
    assert policy.training
    assert not policy.model.layers[0].training
    with pytest.raises(TokenRatioError, match="sample 1 has no prompt ids"):
        predictive_entropy(policy, [[samples[0][0], TokenRow((), (4,))]])
    with pytest.raises(TokenRatioError, match="no samples"):
        predictive_entropy(policy, [[]])
