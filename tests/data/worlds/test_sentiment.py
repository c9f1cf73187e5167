import itertools
import math
import os
import random
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenratio.data import read_rows
from tokenratio.data.worlds import WORLDS, world_rows
from tokenratio.data.worlds.sentiment import SentimentWorld
from tokenratio.data.worlds.sentiment_prompts import FORMS, NUM_HELD_OUT, TOPICS, prompts_by_split
from tokenratio.data.worlds.vader import analyzer, word_valences
from tokenratio.errors import TokenRatioError

vader = pytest.importorskip("vaderSentiment.vaderSentiment", reason="needs the extra worlds")

WORLD = SentimentWorld()
PLAIN = vader.SentimentIntensityAnalyzer()
TEXTS = [
    "The old house was great, but the kitchen was NOT very good!",
    "I have no doubt that it is the best bridge I never loved.",
    "kind of nice :) and rather dreadful :(",
    "Lovely 😁great\n\n* the\u00a0food: bad-tempered, (awful)…",
    "Yeah right, the bomb. It was to die for, at least the soup wasn't horrible???",
    "good good bad but bad good",
    "",
    " \n",
    "?!",
]


def seen_by(texts):
    """A sampler that gives every prompt the same two responses."""
    return lambda prompts, num: [list(texts[:num]) for _ in prompts]


# --- prompts --------------------------------------------------------------------------------------


def test_no_prompt_and_no_topic_is_in_both_splits():
    splits = prompts_by_split()
    topics = [topic for group in TOPICS.values() for topic in group]
    assert len(set(topics)) == len(topics) == 90
    held_out = {topic for topic in topics if any(f.format(topic) in splits["test"] for f in FORMS)}
    assert len(held_out) == NUM_HELD_OUT * len(TOPICS)
    # No phrase of one split is a part of one of the other, either.
    for inside, other in itertools.product(held_out, set(topics) - held_out):
        assert inside not in other
        assert other not in inside
    for split, num in (("train", 576), ("test", 144)):
        assert len(set(splits[split])) == len(splits[split]) == num
    assert not set(splits["train"]) & set(splits["test"])
    assert {f.format(topic) for f in FORMS for topic in topics} == {
        *splits["train"],
        *splits["test"],
    }


def test_prompts_are_drawn_without_replacement():
    texts = [messages[0]["content"] for messages in WORLD.prompts(150, seed=3, split="test")]
    assert len(set(texts[:144])) == 144
    assert texts[:5] == [m[0]["content"] for m in WORLD.prompts(5, seed=3, split="test")]
    assert texts[:5] != [m[0]["content"] for m in WORLD.prompts(5, seed=4, split="test")]
    assert all(messages[0]["role"] == "user" for messages in WORLD.prompts(3, seed=0))


@pytest.mark.slow
def test_the_same_in_every_process():
    code = (
        "from tokenratio.data.worlds import world_rows\n"
        "draw = lambda prompts, num: [[str(p)[::2], str(p)[::3]] for p in prompts]\n"
        "print(world_rows('world:sentiment?prompts=40&seed=5'),"
        " world_rows('world:sentiment?pairs=9&flip_rate=0.3', sampler=draw))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("0", "1")
    }
    assert len(printed) == 1
    assert printed.pop().startswith(str(world_rows("world:sentiment?prompts=40&seed=5")))


# --- pairs ----------------------------------------------------------------------------------------


def test_rows_are_conversations_with_their_rewards():
    (row,) = world_rows("world:sentiment?pairs=1", sampler=seen_by(["so good", "so bad"]))
    (message,) = row["chosen"]
    assert message["role"] == "assistant"
    assert row["prompt"][0]["role"] == "user"
    assert row["chosen_reward"] == WORLD.gold_reward(message["content"])
    (prompt,) = world_rows("world:sentiment?prompts=1")
    assert prompt == {"prompt": row["prompt"]}


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_labels_follow_bradley_terry(temperature):
    num, texts = 3000, ["a good day", "a long day"]
    rows = WORLD.preference_pairs(num, seed=0, temperature=temperature, sampler=seen_by(texts))
    margin = WORLD.gold_reward(texts[0]) - WORLD.gold_reward(texts[1])
    prob = 1 / (1 + math.exp(-margin / temperature))
    assert 0.6 < prob < 0.9
    won = sum(row["chosen"][0]["content"] == texts[0] for row in rows) / num
    assert won == pytest.approx(prob, abs=4 * math.sqrt(prob * (1 - prob) / num))


def test_flips_reverse_labels():
    sampler = seen_by(["a good day", "a long day"])
    clean, noisy = (
        WORLD.preference_pairs(800, seed=1, flip_rate=rate, sampler=sampler) for rate in (0.0, 0.2)
    )
    assert 0.15 < sum(row["flipped"] for row in noisy) / 800 < 0.25
    for before, after in zip(clean, noisy, strict=True):
        assert (after["chosen"] == before["rejected"]) == after["flipped"]


def test_pairs_need_a_policy():
    for read in (world_rows, read_rows):
        with pytest.raises(TokenRatioError, match="its pairs come from a policy"):
            read("world:sentiment?pairs=2")


def test_what_the_world_does_not_have():
    with pytest.raises(TokenRatioError, match="no corpus"):
        world_rows("world:sentiment?corpus=2")
    for call in (WORLD.build_tokenizer, WORLD.policy_config):
        with pytest.raises(TokenRatioError, match="this world has no"):
            call()
    with pytest.raises(TokenRatioError, match="no split 'tst' in the sentiment world"):
        world_rows("world:sentiment?prompts=2&split=tst")


# --- reward ---------------------------------------------------------------------------------------


def vader_compound(valences, text):
    """VADER's own last step."""
    return PLAIN.score_valence(valences, text)["compound"]


@pytest.mark.parametrize("text", TEXTS)
def test_valences_are_those_behind_vaders_score(text):
    words = word_valences(text)
    # VADER looks for "!" and "?" in the text with the names of emojis, which have none.
    found = vader_compound([word.value for word in words], text)
    assert found == PLAIN.polarity_scores(text)["compound"]


SCRAPS = [
    *(
        "good",
        "Bad!",
        "NOT",
        "but",
        "very",
        "kind",
        "of",
        "no",
        "never",
        "so",
        "the",
        "bomb",
        "least",
    ),
    *(":)", "😁", "☹", "x😁y", "...", "-", "\n", "\t", "\u2003", "isn't", "GREAT"),
]


@given(st.lists(st.sampled_from(SCRAPS)), st.sampled_from([" ", "", "  "]))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_any_text_has_spans_that_sum_to_its_score(scraps, between):
    text = between.join(scraps)
    words = word_valences(text)
    assert vader_compound([w.value for w in words], text) == PLAIN.polarity_scores(text)["compound"]
    assert all(0 <= word.start < word.end <= len(text) for word in words)
    assert math.fsum(w.value for w in WORLD.word_values(text)) == pytest.approx(
        WORLD.gold_reward(text), abs=1e-9
    )


def test_spans_are_the_words():
    text = "It was (very) good, but NOT great 😁!"
    valued = {text[w.start : w.end]: w.value for w in word_valences(text) if w.value}
    assert set(valued) == {"good", "great", "😁"} - ({"😁"} if "😁" not in valued else set())
    assert valued["good"] > 0 > valued["great"]


def test_the_reward_by_hand():
    # "good" has valence 1.9, "awful" −2.0 in VADER's lexicon.
    assert WORLD.gold_reward("a good day") == pytest.approx(4 * 1.9 / math.sqrt(1.9**2 + 15))
    assert WORLD.gold_reward("an awful day") == pytest.approx(-4 * 2.0 / math.sqrt(4 + 15))
    assert WORLD.gold_reward("a good day!!!") == WORLD.gold_reward("a good day")
    assert WORLD.gold_reward("") == 0
    assert SentimentWorld(scale=1.0).gold_reward("a good day") < 1


def test_neutral_words_earn_nothing():
    words = ["the", "table", "stood", "on", "a", "floor", "of", "wood", "near", "it"]
    rng, text = random.Random(0), "a good day"
    for _ in range(20):
        text += " " + rng.choice(words)
    assert WORLD.gold_reward(text) == WORLD.gold_reward("a good day")


def test_a_missing_package_is_one_line(monkeypatch):
    analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    try:
        assert len(world_rows("world:sentiment?prompts=2")) == 2  # they need no reward
        for call in (
            WORLD.require,
            lambda: world_rows("world:sentiment?pairs=2", sampler=pytest.fail),
        ):
            with pytest.raises(TokenRatioError, match=r"pip install 'tokenratio\[worlds\]'"):
                call()
    finally:
        analyzer.cache_clear()


def test_registered():
    assert isinstance(WORLDS["sentiment"], SentimentWorld)
    assert Counter(map(len, TOPICS.values())) == {10: 9}
