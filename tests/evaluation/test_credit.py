import dataclasses
import itertools
import math
import random
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tokenratio.data.worlds.review_lexicon import EOS, vocabulary, words_of
from tokenratio.data.worlds.review_reward import ReviewReward
from tokenratio.data.worlds.review_values import ReviewValues, _RewardStates
from tokenratio.data.worlds.reviews import ReviewWorld
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.credit import credit, token_scores
from tokenratio.models.token_rows import TokenRow
from tokenratio.theory import TokenMdp

PROMPT = "review of the hotel :"
exact = settings(deadline=None, derandomize=True)


# --- the true values of the review world ----------------------------------------------------------


def value_by_enumeration(world, prefix):
    """E[reward still to come]: every way to go on, by the world's public functions alone."""
    expected, paid = 0.0, world.gold_reward(prefix)
    pending = [(1.0, prefix)]
    while pending:
        reach, text = pending.pop()
        for word, prob in world.next_word_probs(PROMPT, " ".join(text)).items():
            if word == EOS:
                expected += reach * prob * (world.gold_reward(text) - paid)
            else:
                pending.append((reach * prob, [*text, word]))
    return expected


PUBLISHED = ReviewWorld()
OTHER = ReviewWorld(
    dataclasses.replace(PUBLISHED.grammar, num_clauses=(0.6, 0.4), experience=0.9),
    ReviewReward(mild=0.0, strong=-0.7, intensifier=0.0, later=0.9, token=0.05, finished=0.0),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "beginning", "clause"),
    [
        (
            PUBLISHED,
            "i liked the bed but the bed was average while we hated the pool and",
            "the bed was never so fine .",
        ),
        (
            PUBLISHED,
            "well , the porter was a fool and the bed was dull and the bed was dull but",
            "we never really loved the pool .",
        ),
        (OTHER, "the room was not very good and", "the bed was not slightly great ."),
        (OTHER, "we loved the bed while", "the porter was a fool ."),
    ],
)
def test_values_by_enumeration(world, beginning, clause):
    """Of the last clause, where the ways to go on are few enough to be written out."""
    words = [*words_of(f"{beginning} {clause}"), EOS]
    values = ReviewValues(world.grammar, world.reward).of_response(PROMPT, words)
    begin = len(words_of(beginning))
    before = value_by_enumeration(world, words[:begin])
    for t in range(begin, len(words) - 1):
        reward = world.token_rewards(words[: t + 1])[-1]
        after = value_by_enumeration(world, words[: t + 1])
        assert values.action_value[t] == pytest.approx(reward + after, abs=1e-9)
        assert values.advantage[t] == pytest.approx(reward + after - before, abs=1e-9)
        before = after
    assert (values.action_value[-1], values.advantage[-1]) == (0.0, 0.0)  # EOS had to come


def test_advantages_telescope_and_the_value_is_the_mean_reward(world):
    """Σ_t A = Σ_t r − V(prompt), and V(prompt) is the mean of many rewards."""
    values = ReviewValues(world.grammar, world.reward)
    responses = world.sample_responses([PROMPT], 4000, rng=random.Random(0))[0]
    starts = [
        world.gold_reward(text) - values.of_response(PROMPT, [*words_of(text), EOS]).advantage.sum()
        for text in responses[:200]
    ]
    assert starts == pytest.approx([starts[0]] * 200, abs=1e-8)
    rewards = [world.gold_reward(text) for text in responses]
    error = statistics.stdev(rewards) / math.sqrt(len(rewards))
    assert abs(statistics.mean(rewards) - starts[0]) < 3 * error


def test_the_reference_expects_no_advantage(world):
    values = ReviewValues(world.grammar, world.reward)
    for text in world.sample_responses([PROMPT], 20, rng=random.Random(1))[0]:
        words = words_of(text)
        prefix = words[: len(words) // 2]
        following = world.next_word_probs(PROMPT, " ".join(prefix))
        mean = sum(
            prob * values.of_response(PROMPT, [*prefix, word]).advantage[-1]
            for word, prob in following.items()
        )
        assert mean == pytest.approx(0, abs=1e-8)


def test_no_value_past_what_the_grammar_can_say(world):
    words = words_of("the room was fool good .")  # "was good" alone could be said
    values = ReviewValues(world.grammar, world.reward).of_response(PROMPT, words)
    assert np.isnan(values.advantage).tolist() == [False] * 3 + [True] * 3
    assert np.isnan(values.action_value).tolist() == [False] * 3 + [True] * 3


TELLING = ["not", "never", "very", "slightly", "good", "awful", "plain", "fool", ",", "."]
constants = st.sampled_from([0.0, -0.7, 0.5, 1.0, 1.5])


@exact
@given(
    st.lists(st.sampled_from(TELLING) | st.sampled_from([*vocabulary(), "unheard"]), max_size=30),
    st.builds(
        ReviewReward,
        mild=constants,
        strong=constants,
        intensifier=constants,
        diminisher=constants,
        later=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
        insult=constants,
        token=constants,
        finished=constants,
    ),
)
def test_the_states_of_the_reward_pay_what_it_pays(words, reward):
    states, state, paid = _RewardStates(reward), 0, []
    for word in words:
        amount, state = states.step(state, word)
        paid.append(amount)
    assert paid == pytest.approx(reward.token_rewards(words), abs=1e-12)


# --- rank correlations ----------------------------------------------------------------------------

scores = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=8)
responses = st.lists(
    scores.flatmap(
        lambda gold: st.tuples(
            st.just(gold),
            st.lists(st.integers(-3, 3).map(float), min_size=len(gold), max_size=len(gold)),
        )
    ),
    min_size=1,
    max_size=5,
)


@pytest.mark.slow
@exact
@given(responses)
def test_against_scipy(pairs):
    gold, predicted = zip(*pairs, strict=True)
    measured = credit(predicted, gold, range(len(gold)), num_bootstrap=2)
    within = [
        (stats.spearmanr(p, g).statistic, stats.kendalltau(p, g).statistic)
        for p, g in zip(predicted, gold, strict=True)
        if len(set(p)) > 1 and len(set(g)) > 1
    ]
    assert measured.num_constant_responses == len(pairs) - len(within)
    for index, name in enumerate(["spearman_within", "kendall_within"]):
        expected = statistics.mean(value[index] for value in within) if within else math.nan
        assert getattr(measured, name).value == pytest.approx(expected, nan_ok=True)
    flat = [*itertools.chain(*predicted)], [*itertools.chain(*gold)]
    if len(set(flat[0])) > 1 and len(set(flat[1])) > 1:
        assert measured.spearman.value == pytest.approx(stats.spearmanr(*flat).statistic)
        assert measured.kendall.value == pytest.approx(stats.kendalltau(*flat).statistic)
    else:
        assert math.isnan(measured.spearman.value)


def noisy(num_prompts, *, per_prompt=2, noise=1.0, seed=0):
    """Gold scores, and the same with noise; the prompts they belong to."""
    rng = np.random.default_rng(seed)
    gold = [rng.normal(size=rng.integers(5, 12)) for _ in range(num_prompts * per_prompt)]
    predicted = [row + noise * rng.normal(size=len(row)) for row in gold]
    return predicted, gold, [index // per_prompt for index in range(len(gold))]


def test_only_the_order_counts():
    predicted, gold, prompts = noisy(10)
    plain = credit(predicted, gold, prompts, num_bootstrap=50)
    bent = credit([np.exp(3 * row) for row in predicted], gold, prompts, num_bootstrap=50)
    assert bent == plain
    turned = credit([-row for row in predicted], gold, prompts, num_bootstrap=50)
    assert turned.spearman.value == pytest.approx(-plain.spearman.value)
    assert turned.kendall_within.value == pytest.approx(-plain.kendall_within.value)
    assert turned.spearman.low == pytest.approx(-plain.spearman.high)


@pytest.mark.slow
def test_perfect_credit_is_1_and_random_credit_is_0():
    predicted, gold, prompts = noisy(60, noise=0.0)
    perfect = credit(predicted, gold, prompts, num_bootstrap=20)
    for name in ("spearman", "kendall", "spearman_within", "kendall_within"):
        assert getattr(perfect, name).value == pytest.approx(1)
        assert getattr(perfect, name).low == pytest.approx(1)
    rng = np.random.default_rng(5)
    chance = credit([rng.normal(size=len(row)) for row in gold], gold, prompts)
    assert abs(chance.spearman.value) < 3 * chance.spearman.standard_error
    assert abs(chance.kendall_within.value) < 3 * chance.kendall_within.standard_error


@pytest.mark.slow
def test_the_bootstrap_draws_prompts():
    """Copies of every response under its own prompt change nothing; under new prompts they would.

    Spearman's alone: copies tie with each other, which τ-b sees.
    """
    predicted, gold, prompts = noisy(12)
    once = credit(predicted, gold, prompts)
    twice = credit(predicted * 2, gold * 2, prompts * 2)
    assert twice.spearman.standard_error == pytest.approx(once.spearman.standard_error)
    assert dataclasses.asdict(twice.spearman_within) == pytest.approx(
        dataclasses.asdict(once.spearman_within)
    )
    other = credit(predicted * 2, gold * 2, [*prompts, *(f"copy {i}" for i in prompts)])
    assert other.spearman.standard_error < 0.85 * once.spearman.standard_error
    assert (twice.num_prompts, other.num_prompts) == (12, 24)


@pytest.mark.slow
def test_the_standard_error_is_the_spread_of_repetitions():
    repeated = [credit(*noisy(40, seed=seed), num_bootstrap=0) for seed in range(60)]
    one = credit(*noisy(40, seed=100), num_bootstrap=200)
    for name in ("spearman", "kendall", "spearman_within", "kendall_within"):
        spread = statistics.stdev(getattr(each, name).value for each in repeated)
        assert getattr(one, name).standard_error == pytest.approx(spread, rel=0.35)


def test_what_is_left_out_is_counted():
    measured = credit(
        [[1.0, 2.0, 3.0], [1.0, 1.0], [4.0]],
        [[1.0, math.nan, 2.0], [1.0, 2.0], [math.nan]],
        ["a", "b", "c"],
        num_bootstrap=20,
    )
    assert (measured.num_tokens, measured.num_unknown_tokens) == (4, 2)
    assert (measured.num_responses, measured.num_prompts) == (3, 3)
    assert measured.num_constant_responses == 2
    assert measured.spearman_within.value == pytest.approx(1)


def test_undefined_correlations_are_nan():
    untrained = credit([[0.0, 0.0], [0.0]], [[1.0, 2.0], [3.0]], [0, 1])
    assert math.isnan(untrained.spearman.value)
    assert math.isnan(untrained.kendall_within.standard_error)
    alone = credit([[1.0, 2.0]], [[1.0, 2.0]], ["only"])
    assert alone.spearman.value == pytest.approx(1)
    assert math.isnan(alone.spearman.standard_error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1.0]], [[1.0, 2.0]], [0]), "response 0: .* both must have one per token"),
        (([[1.0], [math.nan]], [[1.0], [2.0]], [0, 1]), "response 1: .* not finite"),
        (([[1.0]], [[1.0]], [0, 1]), "1 responses, but 2 prompts"),
        (([[1.0]], [[math.nan]], [0]), "no token has a true score"),
        (([], [], []), "no token has a true score"),
    ],
)
def test_faults_are_named(arguments, message):
    with pytest.raises(TokenRatioError, match=message):
        credit(*arguments)


@pytest.mark.parametrize("eos", [None, 0])
def test_the_optimum_of_a_tabular_world_has_perfect_credit(eos):
    """β (ρ + KL(π_ref ‖ π*)) = A_ref and β (ρ + log Z) = Q_ref, token by token.

    docs/method.md §1.
    """
    mdp, beta = TokenMdp.random(3, 3, seed=4, eos=eos), 0.3
    optimum = mdp.optimum(beta)
    log_ratio = optimum.log_probs - mdp.ref_log_probs
    kl = -(mdp.ref_log_probs.exp() * log_ratio).sum(-1, keepdim=True)
    batch = mdp.responses
    lengths = batch.response_mask.sum(1).tolist()

    def per_response(table):
        return [part.numpy() for part in table[mdp.states, batch.labels].split(lengths)]

    of_a = credit(
        per_response((beta * (log_ratio + kl)).round(decimals=9)),
        per_response(mdp.a_ref.round(decimals=9)),
        range(len(lengths)),
        num_bootstrap=10,
    )
    of_q = credit(
        per_response(beta * (log_ratio + optimum.baseline[:, None])),
        per_response(mdp.q_ref),
        range(len(lengths)),
        num_bootstrap=10,
    )
    for measured in (of_a, of_q):
        assert measured.spearman.value == pytest.approx(1)
        assert measured.kendall_within.value == pytest.approx(1)
    bare = credit(per_response(log_ratio), per_response(mdp.a_ref), range(len(lengths)))
    assert bare.kendall.value < 0.99


# --- a policy's scores ----------------------------------------------------------------------------

ROWS = [
    TokenRow((1, 60, 61), (70, 71, 72, 2)),
    TokenRow((1, 30), (40, 2)),
    TokenRow((1, 30, 9, 12, 99), (5, 6, 7, 8, 9, 10)),
]


@pytest.fixture
def policies(make_policy):
    return make_policy(0).eval(), make_policy(1).eval()


def scores_by_hand(model, ref_model, row, state_term, beta, baseline=None):
    values = []
    for t, token in enumerate(row.response_ids):
        state = torch.tensor([row.prompt_ids + row.response_ids[:t]])
        with torch.no_grad():
            log_p = model(state).logits[0, -1].double().log_softmax(-1)
            log_q = ref_model(state).logits[0, -1].double().log_softmax(-1)
            hidden = model.model(state).last_hidden_state[0, -1]
        score = (log_p - log_q)[token].item()
        if state_term == "kl":
            score += (log_q.exp() * (log_q - log_p)).sum().item()
        if state_term == "baseline":
            score += baseline(hidden[None]).item()
        values.append(beta * score)
    return values


@pytest.mark.parametrize("state_term", ["none", "kl", "baseline"])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_scores_against_a_loop(policies, state_term, batch_size):
    baseline = (lambda hidden: hidden[:, :5].sum(-1)) if state_term == "baseline" else None
    measured = token_scores(
        *policies,
        ROWS,
        beta=0.3,
        state_term=state_term,
        baseline=baseline,
        batch_size=batch_size,
    )
    for row, values in zip(ROWS, measured, strict=True):
        expected = scores_by_hand(*policies, row, state_term, 0.3, baseline)
        assert values == pytest.approx(expected, abs=1e-5)


def test_a_policy_is_its_own_reference(policies):
    for values in token_scores(policies[0], policies[0], ROWS, beta=0.1, state_term="kl"):
        assert np.abs(values).max() < 1e-6


def test_the_adapter_off_is_the_reference(make_policy):
    from peft import LoraConfig, get_peft_model

    ref, model = make_policy(0).eval(), make_policy(0)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    off = token_scores(adapted, None, ROWS, beta=1.0, state_term="kl")
    apart = token_scores(adapted, ref, ROWS, beta=1.0, state_term="kl")
    for one, other in zip(off, apart, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert np.abs(off[0]).max() > 1e-3


def test_impossible_requests(policies):
    with pytest.raises(TokenRatioError, match="beta must be positive"):
        token_scores(*policies, ROWS, beta=0.0, state_term="none")
    with pytest.raises(TokenRatioError, match="needs a baseline"):
        token_scores(*policies, ROWS, beta=0.1, state_term="baseline")
    with pytest.raises(TokenRatioError, match="PEFT adapter"):
        token_scores(policies[0], None, ROWS, beta=0.1, state_term="none")
