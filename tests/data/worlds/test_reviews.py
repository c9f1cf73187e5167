import math
import os
import re
import statistics
import subprocess
import sys
from collections import Counter

import pytest
import torch

from tokenratio.data.worlds.review_grammar import ReviewGrammar, State, all_prompts
from tokenratio.data.worlds.review_lexicon import SUBJECTS, vocabulary, words_of
from tokenratio.data.worlds.reviews import ReviewWorld
from tokenratio.errors import TokenRatioError

WORLD = ReviewWorld()


@pytest.fixture(scope="module")
def corpus():
    return WORLD.sft_corpus(2000, seed=3)


@pytest.fixture(scope="module")
def tokenizer():
    return WORLD.build_tokenizer()


@pytest.mark.slow
def test_same_seed_same_rows_in_any_process():
    code = (
        "from tokenratio.data.worlds import world_rows\n"
        "rows = [world_rows(f'world:reviews?{kind}=40&seed=5') for kind in ('pairs', 'corpus')]\n"
        "print(rows)"
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
    here = [WORLD.preference_pairs(40, seed=5), WORLD.sft_corpus(40, seed=5)]
    assert printed == {f"{here}\n"}


def test_seeds_differ_and_longer_draws_extend_shorter_ones():
    assert WORLD.sft_corpus(20, seed=0) != WORLD.sft_corpus(20, seed=1)
    assert WORLD.sft_corpus(20, seed=0) == WORLD.sft_corpus(50, seed=0)[:20]
    assert WORLD.prompts(20, seed=0) == WORLD.prompts(5000, seed=0)[:20]


def test_splits_share_no_prompt_and_cover_all():
    train, test = WORLD.prompts(3072, seed=0), WORLD.prompts(768, seed=0, split="test")
    assert len({*train, *test}) == len(train) + len(test) == len(all_prompts())
    assert {*WORLD.prompts(9000, seed=2)} == {*train}
    with pytest.raises(TokenRatioError, match="train or test"):
        WORLD.prompts(3, seed=0, split="valid")


def test_productions_sum_to_one():
    """Of every nonterminal the default grammar can reach."""
    grammar = ReviewGrammar()
    todo = [State("Review", topic) for topic in SUBJECTS]
    seen = set(todo)
    while todo:
        productions = list(grammar.productions(todo.pop()))
        assert math.fsum(prob for prob, _ in productions) == pytest.approx(1.0, abs=1e-12)
        for prob, body in productions:
            if prob == 0:  # a connective after the last clause
                continue
            new = {symbol for symbol in body if isinstance(symbol, State)} - seen
            seen |= new
            todo += new
    assert len(seen) > 100


def test_log_prob_of_a_review_by_hand():
    probs = [
        *(0.7, 0.7, 0.75 / 5, 1 / 4),  # no opener, "the", "room", "was"
        *(0.2 / 2, 0.25 / 4, 0.85 * 0.5 * 0.65 / 6),  # "not", "very", "good"
        *(0.7 * 0.5, 0.22 / 2, 0.2, 0.75 * 0.25 * 0.65 / 2),  # "and", "i", "never", "disliked"
        *(1.0, 1 / 5, 0.35 / 0.7, 1.0),  # "the", "pool", ".", EOS
    ]
    probs[0:2] = [probs[0] * probs[1]]
    prompt, text = (
        "review of the hotel :",
        "the room was not very good and i never disliked the pool .",
    )
    found = WORLD.token_log_probs(prompt, text)
    assert found == pytest.approx([math.log(prob) for prob in probs])
    assert WORLD.log_prob(prompt, text) == pytest.approx(math.log(math.prod(probs)))


@pytest.mark.parametrize(
    ("prefix", "good"),
    [
        ("the bed was", 0.5),
        ("the bed was not", 0.5),
        ("the bed was good and the room was", 0.75),
        ("the bed was good but the room was", 0.25),
        ("the bed was good while the room was", 0.5),
        ("the bed was good and the room was plain and the lobby was", 0.75),
        ("the bed was good and the room was not", 0.25),
        ("the bed was not good but the room was not", 0.25),
        ("we loathed the bed and the room was never very", 0.75),
        ("the porter was a fool and the room was", 0.25),
        ("only a fool would choose the bed but the room was", 0.75),
        ("only a fool would choose the bed and we", 0.25),
    ],
)
def test_mood(prefix, good):
    """The share of good words among the opinions that can come next."""
    probs = WORLD.next_word_probs("review of the hotel :", prefix)
    worth = {word: WORLD.gold_reward(word) - WORLD.reward.token for word in probs}
    good_words = math.fsum(prob for word, prob in probs.items() if worth[word] > 0)
    bad_words = math.fsum(prob for word, prob in probs.items() if worth[word] < 0)
    assert good_words / (good_words + bad_words) == pytest.approx(good)


def test_what_cannot_be_said_has_no_probability():
    assert WORLD.log_prob("review of the hotel :", "the soup was good .") == -math.inf
    assert WORLD.log_prob("review of the hotel :", "the room was good") == -math.inf
    assert WORLD.log_prob("review of the hotel :", "") == -math.inf
    with pytest.raises(TokenRatioError, match="no topic"):
        WORLD.log_prob("what is two plus two ?", "four")


def test_next_word_probs():
    probs = WORLD.next_word_probs("review of the cafe :", "to be fair")
    assert probs == {",": 1.0}
    start = WORLD.next_word_probs("review of the cafe :")
    assert math.fsum(start.values()) == pytest.approx(1.0)
    assert WORLD.next_word_probs("review of the cafe :", "nonsense") == {}


def test_corpus_parses_and_no_word_is_missing(corpus):
    assert all(math.isfinite(WORLD.log_prob(**row)) for row in corpus)
    used = Counter(word for row in corpus for text in row.values() for word in words_of(text))
    assert set(used) == set(vocabulary()) - {"<pad>", "<bos>", "<eos>", "<unk>"}


def test_tokenizer_is_lossless(corpus, tokenizer, tmp_path):
    texts = [text for row in corpus for text in row.values()] + all_prompts()
    encoded = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(encoded, skip_special_tokens=True) == texts
    assert not any(tokenizer.unk_token_id in ids for ids in encoded)
    assert all(ids.count(tokenizer.bos_token_id) == 1 and ids[0] == 1 for ids in encoded)
    assert len(tokenizer) == len(vocabulary()) == WORLD.policy_config().vocab_size

    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert loaded(texts)["input_ids"] == encoded


@pytest.mark.parametrize(
    "text",
    ["", "a:the good.", "not good.<eos> x_y", "“hm” – 3.5!?...", "a<eos>.<pad>b<eos", "Good\nbad"],
)
def test_tokens_are_the_words_that_the_reward_sees(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    known = vocabulary()
    words = [word if word in known else "<unk>" for word in words_of(text)]
    assert tokenizer.convert_ids_to_tokens(ids) == words
    assert len(ids) == len(WORLD.token_rewards(text))


@pytest.mark.slow
def test_statistics_of_the_world():
    """The figures of docs/review-world.md."""
    pairs = WORLD.preference_pairs(4000, seed=11)
    texts = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    rewards = [WORLD.gold_reward(text) for text in texts]
    assert statistics.mean(rewards) == pytest.approx(-0.11, abs=0.1)
    assert statistics.stdev(rewards) == pytest.approx(1.94, abs=0.1)
    assert statistics.mean(map(WORLD.has_insult, texts)) == pytest.approx(0.27, abs=0.03)
    assert statistics.mean(len(words_of(text)) + 1 for text in texts) == pytest.approx(
        14.35, abs=0.3
    )
    ratios = [
        (min(lengths) + 1) / (max(lengths) + 1)
        for pair in pairs
        if (lengths := [len(words_of(pair[side])) for side in ("chosen", "rejected")])
    ]
    assert statistics.mean(ratios) == pytest.approx(0.64, abs=0.02)
    agree = [pair["chosen_reward"] >= pair["rejected_reward"] for pair in pairs]
    assert statistics.mean(agree) == pytest.approx(0.815, abs=0.025)
    good = re.compile(r"\b(good|great)\b")
    bad = re.compile(r"\b(bad|awful)\b")
    assert sum(map(bool, map(good.search, texts))) == pytest.approx(
        sum(map(bool, map(bad.search, texts))), rel=0.15
    )


def test_policy_size():
    from transformers import LlamaForCausalLM

    assert LlamaForCausalLM(WORLD.policy_config()).num_parameters() == 468_096
    assert WORLD.policy_config(num_hidden_layers=1).num_hidden_layers == 1


def _batch(tokenizer, rows):
    """Right-padded ids, and labels that are −100 outside completion and EOS."""
    encoded = [
        (
            tokenizer(row["prompt"])["input_ids"],
            tokenizer(row["completion"] + " <eos>", add_special_tokens=False)["input_ids"],
        )
        for row in rows
    ]
    length = max(len(prompt) + len(completion) for prompt, completion in encoded)
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full_like(input_ids, -100)
    for row, (prompt, completion) in enumerate(encoded):
        end = len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
    return {"input_ids": input_ids, "labels": labels}


@pytest.mark.slow
def test_a_policy_learns_the_grammar(tokenizer):
    """In 300 steps, about 25 s on two cores: cross-entropy within 4 % of the entropy rate."""
    from transformers import LlamaForCausalLM

    from tokenratio.models.generation import sample_responses

    num_steps, rows_per_step = 300, 64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(WORLD.policy_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 5e-3, total_steps=num_steps, pct_start=0.1, cycle_momentum=False
    )
    rows = WORLD.sft_corpus(num_steps * rows_per_step, seed=0)
    for begin in range(0, len(rows), rows_per_step):
        optimizer.zero_grad()
        model(**_batch(tokenizer, rows[begin : begin + rows_per_step])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    held_out = WORLD.sft_corpus(500, seed=1, split="test")
    batch = _batch(tokenizer, held_out)
    num_tokens = int((batch["labels"] != -100).sum())
    entropy = -sum(WORLD.log_prob(**row) for row in held_out) / num_tokens
    with torch.no_grad():
        cross_entropy = model(**batch).loss.item()
    assert entropy * 0.99 < cross_entropy < entropy * 1.04

    prompts = WORLD.prompts(200, seed=2, split="test")
    samples = sample_responses(model, tokenizer, prompts, max_new_tokens=48, seed=0)
    parsed = [
        math.isfinite(WORLD.log_prob(prompt, sample.text))
        for prompt, (sample,) in zip(prompts, samples, strict=True)
    ]
    assert statistics.mean(parsed) > 0.85
