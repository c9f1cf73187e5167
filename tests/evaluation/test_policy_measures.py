"""Each group of measures against a computation by hand."""

import json
import math
import statistics
from collections import Counter
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tokenratio.data import prepare_pairs
from tokenratio.data.template import TemplateSettings
from tokenratio.data.worlds.review_lexicon import EOS, words_of
from tokenratio.data.worlds.review_values import ReviewValues
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.credit import credit, token_scores
from tokenratio.evaluation.credit_measures import measure_credit
from tokenratio.evaluation.diversity import self_bleu, vendi_score
from tokenratio.evaluation.inputs import LoadedPolicy
from tokenratio.evaluation.model_measures import measure_pairs, measure_policy
from tokenratio.evaluation.policy_measures import (
    measure_log,
    measure_responses,
    measure_world,
)
from tokenratio.evaluation.response_files import AnsweredPrompt
from tokenratio.evaluation.verdict_files import Judgement
from tokenratio.evaluation.win_report import measure_judgements
from tokenratio.models.generation import sample_responses
from tokenratio.models.response import Response
from tokenratio.models.state_baseline import StateBaseline
from tokenratio.models.token_rows import TokenRow

PROMPTS = ["review of the hotel :", "note about the old camera for my boss :", "the"]


def named(measures):
    names = [measure.name for measure in measures]
    assert len(set(names)) == len(names)
    return {measure.name: measure for measure in measures}


def generation(id, *texts, cut=(), token_ids=None):
    samples = [
        Response(text, "length" if i in cut else "eos", token_ids) for i, text in enumerate(texts)
    ]
    return AnsweredPrompt(id, "a prompt", tuple(samples), "0")


@pytest.fixture
def policies(make_policy):
    return make_policy(0), make_policy(1)


@pytest.fixture
def loaded(policies, tokenizer):
    return LoadedPolicy(*policies, tokenizer, TemplateSettings(), batch_size=5)


@pytest.fixture
def generations(policies, tokenizer):
    sampled = sample_responses(
        policies[0], tokenizer, PROMPTS, num_samples=2, max_new_tokens=9, seed=0
    )
    return [
        AnsweredPrompt(f"p:{i}", prompt, tuple(samples), "0")
        for i, (prompt, samples) in enumerate(zip(PROMPTS, sampled, strict=True))
    ]


# responses


def test_responses():
    groups = [generation("a", "so so good", "it was"), generation("b", "a b", "c d", cut=[1])]
    found = named(measure_responses(groups))
    words = found["length/words"]
    assert words.values == (("a", 0, 3.0), ("a", 1, 2.0), ("b", 0, 2.0), ("b", 1, 2.0))
    assert words.mean == 9 / 4
    assert found["cut"].mean == 1 / 4
    assert "length/tokens" not in found
    assert found["diversity/distinct_1"].values == (("a", 0, 2 / 3), ("b", 0, 1.0))
    texts = [["so so good", "it was"], ["a b", "c d"]]
    for name, expected in (("self_bleu", self_bleu(texts)), ("vendi", vendi_score(texts))):
        values = [value for _, _, value in found[f"diversity/{name}"].values]
        assert values == expected
    assert (found["diversity/self_bleu"].better, found["diversity/vendi"].better) == (
        "lower",
        "higher",
    )
    assert found["length/words"].better is None


def test_one_sample_has_no_self_bleu_and_an_empty_one_no_distinct():
    found = named(measure_responses([generation("a", ""), generation("b", "one two")]))
    assert not {"diversity/self_bleu", "diversity/vendi"} & found.keys()
    assert found["diversity/distinct_2"].values == (("b", 0, 1.0),)
    assert found["length/words"].mean == 1


def test_lengths_in_tokens_where_all_are_known():
    known = [generation("a", "so good", token_ids=(5, 6, 2))]
    (measure,) = [m for m in measure_responses(known) if m.name == "length/tokens"]
    assert (measure.mean, measure.unit) == (3, "tokens")
    mixed = [*known, generation("b", "so")]
    assert "length/tokens" not in named(measure_responses(mixed))


def test_the_world_knows_the_reward(world, generations):
    found = named(measure_world(generations, world))
    texts = [(g.id, i, s.text) for g in generations for i, s in enumerate(g.samples)]
    assert found["gold_reward"].values == tuple((*p, world.gold_reward(t)) for *p, t in texts)
    assert found["insults"].values == tuple((*p, float(world.has_insult(t))) for *p, t in texts)
    assert (found["gold_reward"].better, found["insults"].better) == ("higher", "lower")


# the policy at its samples


def by_hand(model, ref_model, tokenizer, prompt, response_ids):
    """KL(π ‖ π_ref) of a response and its mean entropy, token by token in float64."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    kl, entropies = 0.0, []
    for t in range(len(response_ids)):
        state = torch.tensor([[*prompt_ids, *response_ids[:t]]])
        with torch.no_grad():
            p = model(state).logits[0, -1].double().softmax(-1)
            ref_p = ref_model(state).logits[0, -1].double().softmax(-1)
        kl += (p * (p / ref_p).log()).sum().item()
        entropies.append(-(p * p.log()).sum().item())
    return kl, statistics.mean(entropies)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_kl_and_entropy_by_hand(batch_size, policies, tokenizer, generations):
    hand = {
        (g.id, i): by_hand(*policies, tokenizer, g.prompt, sample.token_ids)
        for g in generations
        for i, sample in enumerate(g.samples)
    }
    policy = LoadedPolicy(*policies, tokenizer, TemplateSettings(), batch_size)
    ref_model = policies[1]
    found = measure_policy(policy, generations, reference=ref_model, is_own_distribution=True)
    found = named(found)
    kl = found["kl_policy_ref"]
    assert [(id, i) for id, i, _ in kl.values] == list(hand)
    assert [v for *_, v in kl.values] == pytest.approx([kl for kl, _ in hand.values()], rel=1e-5)
    assert kl.unit == "nats per response"
    entropy = found["diversity/entropy"]
    assert [id for id, _, _ in entropy.values] == ["p:0", "p:1", "p:2"]
    for id, _, value in entropy.values:
        of_prompt = [entropy for (name, _), (_, entropy) in hand.items() if name == id]
        assert value == pytest.approx(statistics.mean(of_prompt), rel=1e-5)


def test_no_kl_where_the_samples_are_not_the_policys(loaded, generations):
    found = measure_policy(
        loaded, generations, reference=loaded.ref_model, is_own_distribution=False
    )
    assert [measure.name for measure in found] == ["diversity/entropy", "perplexity_ref"]
    alone = replace(loaded, ref_model=None)
    found = measure_policy(alone, generations, reference=None, is_own_distribution=True)
    assert [measure.name for measure in found] == ["diversity/entropy"]


def test_a_response_whose_tokens_are_not_known(loaded):
    with pytest.raises(TokenRatioError, match="b: a response without token_ids"):
        measure_policy(
            loaded, [generation("b", "so good")], reference=None, is_own_distribution=True
        )


def test_perplexity_under_the_reference_by_hand(policies, loaded, tokenizer, generations):
    losses = []
    for each in generations:
        prompt_ids = tokenizer(each.prompt)["input_ids"]
        for sample in each.samples:
            ids = torch.tensor([[*prompt_ids, *sample.token_ids]])
            with torch.no_grad():
                log_probs = policies[1](ids).logits[0].double().log_softmax(-1)
            own = range(len(prompt_ids), ids.shape[1])
            losses.append(-statistics.mean(log_probs[t - 1, ids[0, t]].item() for t in own))
    found = measure_policy(loaded, generations, reference=policies[1], is_own_distribution=False)
    perplexity = named(found)["perplexity_ref"]
    assert perplexity.mean == pytest.approx(math.exp(statistics.mean(losses)), rel=1e-5)
    by_prompt = [statistics.mean(losses[i : i + 2]) for i in range(0, len(losses), 2)]
    assert len(by_prompt) == len(generations)
    error = statistics.stdev(by_prompt) / math.sqrt(len(by_prompt))
    assert perplexity.standard_error == pytest.approx(perplexity.mean * error, rel=1e-5)
    assert perplexity.num == len(losses)


# judgements


def judgement(id, sample, first, second, length_a=10, length_b=10):
    both = first is not None and second is not None
    return Judgement(
        id=id,
        sample=sample,
        prob_a_first=first,
        prob_a_second=second,
        probability=(first + second) / 2 if both else None,
        flipped=(first - 0.5) * (second - 0.5) < 0 if both else None,
        unparsed=(first is None) + (second is None),
        reasons=("garbled",) * ((first is None) + (second is None)),
        characters_a=length_a,
        characters_b=length_b,
        words_a=length_a,
        words_b=length_b,
        content="",
        settings="",
    )


JUDGED = [
    judgement("a", 0, 0.9, 0.8, 10, 12),  # win
    judgement("a", 1, 0.9, 0.2, 14, 11),  # flipped: a tie
    judgement("b", 0, 0.1, 0.4, 9, 15),  # loss
    judgement("b", 1, 0.9, None, 8, 8),  # not judged
    judgement("c", 0, 0.9, 0.5, 10, 17),  # even in one order: a tie
]


def test_judgements_by_hand():
    found = named(measure_judgements(JUDGED, "llm", order_matters=True))
    rate = found["win_rate/llm"]
    assert rate.values == (("a", 0, 1.0), ("a", 1, 0.5), ("b", 0, 0.0), ("c", 0, 0.5))
    # residuals around 1/2, summed by prompt: 1/2, −1/2, 0
    assert (rate.mean, rate.num, rate.better) == (0.5, 4, "higher")
    assert rate.standard_error == pytest.approx(math.sqrt(3 / 2 * (1 / 4 + 1 / 4)) / 4)
    assert [found[f"{name}/llm"].mean for name in ("win", "tie", "lose")] == [0.25, 0.5, 0.25]
    assert found["position_flips/llm"].values[1] == ("a", 1, 1.0)
    assert found["position_flips/llm"].mean == 1 / 4
    assert found["not_judged/llm"].mean == 1 / 5
    assert found["not_judged/llm"].values[3] == ("b", 1, 1.0)
    controlled = found["lc_win_rate/llm"]
    assert (controlled.num, controlled.values) == (4, ())
    assert 0 < controlled.mean < 1


def test_no_length_control_where_the_lengths_differ_by_one_number():
    alike = [judgement(str(i), 0, 0.9, 0.9, 10 + i, 12 + i) for i in range(4)]
    notes = []
    found = named(measure_judgements(alike, "gold", order_matters=True, report=notes.append))
    assert "lc_win_rate/gold" not in found
    (note,) = notes
    assert note.startswith("no lc_win_rate/gold: every response of A is shorter by 2 than B's")
    assert found["win_rate/gold"].mean == 1


def test_a_judge_that_never_gave_a_verdict():
    unjudged = [judgement("a", i, None, 0.5) for i in range(3)]
    notes = []
    found = named(measure_judgements(unjudged, "llm", order_matters=True, report=notes.append))
    assert notes == ["no lc_win_rate/llm: none of 3 comparisons has a verdict."]
    assert found["not_judged/llm"].mean == 1
    for name in ("win_rate", "win", "tie", "lose", "position_flips"):
        assert math.isnan(found[f"{name}/llm"].mean)
        assert found[f"{name}/llm"].num == 0


# held-out pairs


def sequence_log_prob(model, prompt_ids, response_ids):
    """From the whole logits, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt_ids, *response_ids]])).logits[0].double()
    states = logits[len(prompt_ids) - 1 : -1].log_softmax(-1)
    return states[range(len(response_ids)), response_ids].sum().item()


@pytest.fixture
def data(world, tokenizer):
    """Twelve pairs, the first prompt three times."""
    rows = world.preference_pairs(10, seed=1)
    rows += [{**row, "prompt": rows[0]["prompt"]} for row in world.preference_pairs(2, seed=2)]
    return prepare_pairs(rows, tokenizer, max_length=64, max_prompt_length=None)


@pytest.mark.parametrize("has_adapter", [False, True], ids=["full", "lora"])
def test_pairs_by_hand(has_adapter, policies, loaded, data):
    model, ref_model = policies
    if has_adapter:
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, config)
    rows = list(data.dataset)
    margins, accuracy, longer = [], [], []
    for row in rows:
        ratios = [
            sequence_log_prob(model, row["prompt_ids"], row[f"{side}_ids"])
            - sequence_log_prob(ref_model, row["prompt_ids"], row[f"{side}_ids"])
            for side in ("chosen", "rejected")
        ]
        margins.append(0.3 * (ratios[0] - ratios[1]))
        accuracy.append(float(margins[-1] > 0))
        gap = len(row["chosen_ids"]) - len(row["rejected_ids"])
        longer.append((gap, 0.5 + 0.5 * ((gap > 0) - (gap < 0))))
    subsets = ["even" if i % 2 == 0 else "odd" for i in range(len(rows))]
    policy = replace(loaded, model=model)
    found = named(measure_pairs(policy, data, beta=0.3, subsets=subsets))
    margin = found["pairs/margin"]
    assert [value for *_, value in margin.values] == pytest.approx(margins, rel=1e-4, abs=1e-5)
    assert [value for *_, value in found["pairs/accuracy"].values] == accuracy
    assert found["pairs/accuracy, even"].mean == pytest.approx(statistics.mean(accuracy[::2]))
    assert found["pairs/accuracy, odd"].mean == pytest.approx(statistics.mean(accuracy[1::2]))
    longer_wins = statistics.mean(wins for _, wins in longer)
    assert found["pairs/longer_wins"].mean == pytest.approx(longer_wins)
    best = max(longer_wins, 1 - longer_wins)
    rule = "longer" if longer_wins >= 0.5 else "shorter"
    over = found[f"pairs/over_{rule}_wins"]
    assert over.mean == pytest.approx(statistics.mean(accuracy) - best)
    by_length = [m for m in found.values() if "chosen longer by" in m.name]
    assert sum(m.num for m in by_length) == len(rows)
    assert by_length[0].name.startswith(f"pairs/accuracy, chosen longer by {min(longer)[0]} to ")
    assert by_length[-1].name.endswith(f" to {max(longer)[0]}")


def test_pairs_of_one_prompt_are_one_draw(loaded, data):
    found = named(measure_pairs(loaded, data, beta=0.1))
    prompts = [str(row["prompt_ids"]) for row in data.dataset]
    first = {prompt: data.dataset["origin"][prompts.index(prompt)] for prompt in prompts}
    for name in ("pairs/accuracy", "pairs/margin"):
        measure = found[name]
        assert [id for id, _, _ in measure.values] == [first[prompt] for prompt in prompts]
        assert len({(id, i) for id, i, _ in measure.values}) == len(prompts)
        sums = Counter()
        for id, _, value in measure.values:
            sums[id] += value - measure.mean
        groups = len(sums)
        assert groups < len(prompts)
        variance = groups / (groups - 1) * sum(each**2 for each in sums.values())
        assert measure.standard_error == pytest.approx(math.sqrt(variance) / len(prompts))


# credit and stability


@pytest.mark.slow
def test_credit_by_its_state_terms(loaded, tokenizer, world):
    """Words, EOS included, meet their own scores."""
    pairs = world.preference_pairs(12, seed=0)
    data = prepare_pairs(pairs, tokenizer, max_length=128, max_prompt_length=None)
    baseline = StateBaseline(32, 4)
    torch.manual_seed(0)
    torch.nn.init.normal_(baseline.layers[-1].weight)
    measures = measure_credit(loaded, data, world=world, beta=0.1, baseline=baseline)
    assert [measure.name for measure in measures] == [
        f"credit/{term}/{kind}"
        for term in ("log_ratio", "log_ratio+kl", "log_ratio+baseline")
        for kind in ("spearman", "spearman_within", "kendall")
    ]
    assert all(-1 <= m.mean <= 1 and m.standard_error > 0 for m in measures)
    assert len({m.mean for m in measures}) == 9
    assert {m.better for m in measures} == {"higher"}
    texts = [(pair["prompt"], pair[side]) for pair in pairs for side in ("chosen", "rejected")]
    rows = [
        TokenRow(
            tuple(tokenizer(prompt)["input_ids"]),
            (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id),
        )
        for prompt, text in texts
    ]
    values = ReviewValues(world.grammar, world.reward)
    true = [values.of_response(prompt, [*words_of(text), EOS]) for prompt, text in texts]
    # the baseline's scores are compared with action values, the others with advantages
    for index, (term, target) in enumerate(
        (("none", "advantage"), ("kl", "advantage"), ("baseline", "action_value"))
    ):
        expected = credit(
            token_scores(
                loaded.model,
                loaded.ref_model,
                rows,
                beta=0.1,
                state_term=term,
                baseline=baseline if term == "baseline" else None,
                batch_size=5,
            ),
            [getattr(each, target) for each in true],
            [prompt for prompt, _ in texts],
            num_bootstrap=0,
        )
        found = [measure.mean for measure in measures[3 * index : 3 * index + 3]]
        assert found == [
            expected.spearman.value,
            expected.spearman_within.value,
            expected.kendall.value,
        ]
        assert measures[3 * index].num == expected.num_tokens
    policy = replace(loaded, batch_size=3)
    doubled = measure_credit(policy, data, world=world, beta=0.2, baseline=None)
    assert [measure.mean for measure in doubled] == pytest.approx(
        [measure.mean for measure in measures[:6]], abs=1e-4
    )


def test_credit_needs_the_worlds_tokenizer(loaded, data, world):
    class Subwords:
        def convert_ids_to_tokens(self, ids):
            return [f"##{index}" for index in ids]

    policy = replace(loaded, tokenizer=Subwords())
    with pytest.raises(TokenRatioError, match="'##1' is not a word of the review world"):
        measure_credit(policy, data, world=world, beta=0.1, baseline=None)


def test_a_log_in_figures_and_words(tmp_path):
    lines = [
        {"step": step, "loss": 1.0 - step / 100, "grad_norm": float(step)} for step in range(1, 11)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 11, "lo')
    measures, sentences = measure_log(tmp_path)
    found = named(measures)
    assert found["stability/grad_norm/max"].mean == 10
    assert found["stability/grad_norm/median"].mean == 5.5
    assert found["stability/lines/truncated"].mean == 1
    assert {measure.num for measure in measures} == {10}
    assert all(math.isnan(measure.standard_error) for measure in measures)
    assert "stability/steps" not in found
    assert any("10 steps" in sentence for sentence in sentences)
