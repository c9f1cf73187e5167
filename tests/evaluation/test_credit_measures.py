"""Which token gets which word's value."""

import math

import numpy as np
import pytest

from templates import chat_pair, family_tokenizer
from tiny import tiny_model
from tokenratio.data import prepare_pairs
from tokenratio.data.template import TemplateSettings
from tokenratio.data.worlds import WORLDS
from tokenratio.data.worlds.protocol import WordValue
from tokenratio.evaluation.credit import credit, token_scores
from tokenratio.evaluation.credit_measures import decoded_ends, measure_credit, values_of_tokens
from tokenratio.evaluation.inputs import LoadedPolicy
from tokenratio.models.token_rows import TokenRow

pytest.importorskip("vaderSentiment", reason="needs the extra worlds")


def test_tokens_have_the_value_of_their_word():
    words = [WordValue(0, 4, 0.0), WordValue(5, 9, 2.0), WordValue(10, 13, -1.0)]
    # "very" | " " "go" | "od" | " b" … "ad" | "" | "od b" spans two words
    ends = [4, 7, 9, 11, 13, 13]
    values = values_of_tokens(words, ends)
    assert values[:5].tolist() == [0.0, 2.0, 2.0, -1.0, -1.0]
    assert math.isnan(values[5])
    assert values_of_tokens(words, [4, 5, 12]).tolist() == [0.0, 0.0, 1.0]
    assert values_of_tokens([], []).tolist() == []


def test_ends_of_bytes_and_special_tokens():
    tokenizer = family_tokenizer("chatml")
    ids = tokenizer("é good", add_special_tokens=False)["input_ids"]
    assert len(ids) == 7  # é is two of them
    text, ends = decoded_ends(tokenizer, [*ids, tokenizer.eos_token_id])
    assert text == "é good"
    assert ends[1:] == [1, 2, 3, 4, 5, 6, 6]
    assert decoded_ends(tokenizer, []) == ("", [])


@pytest.mark.slow
def test_word_credit_by_hand():
    world, tokenizer = WORLDS["sentiment"], family_tokenizer("chatml")
    policies = [
        tiny_model(vocab_size=len(tokenizer), max_position_embeddings=128, seed=s) for s in (0, 1)
    ]
    texts = ["a good day", "not a good idea", "an awful mess", "so nice"]
    pairs = [chat_pair("Hi", *texts[:2]), chat_pair("Ho", *texts[2:])]
    data = prepare_pairs(pairs, tokenizer, max_length=128, max_prompt_length=None)
    policy = LoadedPolicy(*policies, tokenizer, TemplateSettings(), batch_size=3)
    measures = measure_credit(policy, data, world=world, beta=0.1, baseline=None)
    rows, true = [], []
    for row, text in zip([r for r in data.dataset for _ in range(2)], texts, strict=True):
        side = "chosen" if text in (texts[0], texts[2]) else "rejected"
        rows.append(TokenRow(tuple(row["prompt_ids"]), tuple(row[f"{side}_ids"])))
        # One token a character; then the end of the turn, which is no word.
        values = np.zeros(len(text))
        for word in world.word_values(text):
            values[word.start : word.end] = word.value
        rest = len(rows[-1].response_ids) - len(text)
        true.append([*values, *[math.nan] * rest])
    for index, term in enumerate(("none", "kl")):
        scores = token_scores(*policies, rows, beta=0.1, state_term=term)
        expected = credit(scores, true, ["Hi", "Hi", "Ho", "Ho"], num_bootstrap=0)
        kinds = ("spearman", "spearman_within", "kendall")
        for kind, measure in zip(kinds, measures[3 * index :], strict=False):
            name = f"word_credit/log_ratio{'+kl' if term == 'kl' else ''}/{kind}"
            assert (measure.name, measure.num) == (name, expected.num_tokens)
            assert measure.mean == pytest.approx(getattr(expected, kind).value, abs=1e-4)
            assert -1 < measure.mean < 1
