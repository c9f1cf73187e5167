import collections
import random

import pytest
import torch

from templates import family_tokenizer
from tiny import tiny_model
from tokenratio.data.template import TemplateSettings, turn_end
from tokenratio.data.worlds import WORLDS
from tokenratio.errors import TokenRatioError
from tokenratio.models import generation, processes
from tokenratio.models.decoding import generate_rows
from tokenratio.models.generation import (
    encode_prompts,
    iterate_samples,
    policy_sampler,
    sample_responses,
)
from tokenratio.models.processes import Group
from tokenratio.models.sampling import RowSampler, stream_seed

PROMPTS = [
    "review of the hotel :",
    "note about the old camera for my boss :",
    "the",
    "opinion on the small cruise for the paper :",
    "thoughts on the film :",
]


@pytest.fixture(scope="session")
def tokenizer(world):
    return world.build_tokenizer()


def hand_greedy(model, prompt_ids, max_new_tokens, eos_id):
    ids = list(prompt_ids)
    while len(ids) < len(prompt_ids) + max_new_tokens:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == eos_id:
            break
    return tuple(ids[len(prompt_ids) :])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_is_the_same_in_any_batch_and_by_hand(make_policy, tokenizer, family):
    """Left padding changes nothing, absolute position embeddings (GPT-2) included."""
    model = make_policy(0)
    if family == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=len(tokenizer),
                    n_positions=64,
                    n_embd=32,
                    n_layer=2,
                    n_head=2,
                    initializer_range=0.3,
                    bos_token_id=1,
                    eos_token_id=2,
                )
            )
    runs = [
        sample_responses(
            model, tokenizer, PROMPTS, temperature=0, max_new_tokens=12, batch_size=size, seed=size
        )
        for size in (1, 2, 64)
    ]
    assert runs[0] == runs[1] == runs[2]
    model.eval()
    with torch.no_grad():
        for prompt, (sample,) in zip(PROMPTS, runs[0], strict=True):
            prompt_ids = tuple(tokenizer(prompt)["input_ids"])
            assert sample.token_ids == hand_greedy(model, prompt_ids, 12, 2)


def test_one_seed_one_result_and_the_global_state_untouched(make_policy, tokenizer):
    model = make_policy(0)
    before = torch.get_rng_state()
    runs = [
        sample_responses(model, tokenizer, PROMPTS, num_samples=3, max_new_tokens=8, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(row) for row in runs[0]] == [3] * len(PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_neither_batch_nor_order_changes_samples(make_policy, tokenizer, world, dtype, top_p):
    """Each prompt's samples are its own, whatever its padding and the other rows of its batch."""
    model = make_policy(0).to(dtype)
    prompts = [*PROMPTS, *world.prompts(10, seed=0)]
    keys = [str(index) for index in range(len(prompts))]
    options = {"num_samples": 3, "temperature": 1.3, "top_p": top_p, "max_new_tokens": 20}

    def samples(order, **how):
        rows = sample_responses(
            model,
            tokenizer,
            [prompts[i] for i in order],
            keys=[keys[i] for i in order],
            seed=4,
            **options | how,
        )
        return dict(zip(order, rows, strict=True))

    order = list(range(len(prompts)))
    alone = samples(order, batch_size=1)
    assert samples(order, batch_size=7) == alone
    random.Random(0).shuffle(order)
    assert samples(order, batch_size=7) == samples(order, batch_size=64) == alone
    some = samples(order[:5], batch_size=4)
    assert some == {index: alone[index] for index in order[:5]}
    fewer = samples(order, batch_size=7, num_samples=1, max_new_tokens=5)
    for index, (first, *_) in alone.items():
        assert fewer[index][0].token_ids == first.token_ids[:5]


def test_like_prompts_have_streams_of_their_own(make_policy, tokenizer):
    options = {"num_samples": 2, "max_new_tokens": 12, "seed": 0, "temperature": 2.0}
    rows = sample_responses(make_policy(0), tokenizer, [PROMPTS[0]] * 3, **options)
    assert len({sample.token_ids for row in rows for sample in row}) == 6
    keyed = sample_responses(
        make_policy(0), tokenizer, [PROMPTS[0]] * 3, keys=["a", "b", "c"], **options
    )
    assert len({sample.token_ids for row in keyed for sample in row}) == 6
    with pytest.raises(TokenRatioError, match="2 different keys for 3 prompts"):
        sample_responses(
            make_policy(0), tokenizer, [PROMPTS[0]] * 3, keys=["a", "b", "a"], **options
        )


def test_finished_prompts_come_before_the_rest_is_begun(make_policy, tokenizer, monkeypatch):
    model = make_policy(0)
    begun = []
    monkeypatch.setattr(
        generation,
        "generate_rows",
        lambda model, prompts, rows, **how: (
            begun.append(len(rows)),
            generate_rows(model, prompts, rows, **how),
        )[1],
    )
    stream = iterate_samples(
        model, tokenizer, PROMPTS, num_samples=2, max_new_tokens=4, batch_size=3, seed=0
    )
    first, samples = next(stream)
    assert (first, len(samples), begun) == (2, 2, [3])  # the shortest prompt
    assert torch.is_grad_enabled()  # nothing is left switched off while the consumer works
    assert model.training
    assert sorted([first, *(index for index, _ in stream)]) == list(range(len(PROMPTS)))
    assert begun == [3, 3, 3, 1]


@pytest.mark.parametrize(("num_samples", "batch_size", "idle"), [(3, 4, 0), (2, 12, 1), (1, 64, 2)])
def test_several_processes_share_the_batches_of_one(
    make_policy, tokenizer, world, monkeypatch, num_samples, batch_size, idle
):
    """Bit for bit the same samples, and each prompt once, also if some have nothing to do."""
    model, prompts, begun = make_policy(0), world.prompts(11, seed=0), []

    def noted(model, prompts, rows, **how):
        begun.append((tuple(prompts), tuple(rows)))
        return generate_rows(model, prompts, rows, **how)

    monkeypatch.setattr(generation, "generate_rows", noted)
    options = {"num_samples": num_samples, "batch_size": batch_size, "max_new_tokens": 5}

    def share(group):
        monkeypatch.setattr(processes, "_current", group)
        begun.clear()
        found = dict(iterate_samples(model, tokenizer, prompts, seed=0, **options))
        return found, list(begun)

    whole, batches = share(Group())
    shares = [share(Group(index, 3)) for index in range(3)]
    assert sorted(batch for _, of_share in shares for batch in of_share) == sorted(batches)
    assert sorted(index for found, _ in shares for index in found) == list(range(11))
    assert {index: each for found, _ in shares for index, each in found.items()} == whole
    assert sum(not found for found, _ in shares) == idle


def steps_of(logits, num_rows, num_steps, **options):
    """Tokens drawn from the same logits at each step, `[rows, steps]`."""
    seeds = [stream_seed(0, "key", row) for row in range(num_rows)]
    sampler = RowSampler(seeds, **{"temperature": 1.0, "top_p": 1.0} | options)
    rows = logits.expand(num_rows, -1)
    empty = torch.empty(num_rows, 0, dtype=torch.long)
    return torch.stack([sampler(empty, rows.clone()).argmax(-1) for _ in range(num_steps)], 1)


def chi_square(counts, probs):
    expected = counts.sum() * probs
    return ((counts - expected) ** 2 / expected).sum().item()


def test_steps_of_a_row_are_draws_from_softmax_and_independent():
    """χ² of single tokens and of pairs of successive ones; 5σ bounds. The block is redrawn."""
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.5, 0.0, -2.0]])
    probs = logits[0].softmax(-1)
    size, num_rows, num_steps = len(probs), 12, 3000  # 8192 // 7 steps to a block
    tokens = steps_of(logits, num_rows, num_steps)
    for row in tokens:
        degrees = size - 1
        counts = torch.bincount(row, minlength=size)
        assert chi_square(counts, probs) < degrees + 5 * (2 * degrees) ** 0.5 + 10
        pairs = torch.bincount(row[:-1] * size + row[1:], minlength=size**2)
        degrees = size**2 - 1
        joint = (probs[:, None] * probs).flatten()
        assert chi_square(pairs, joint) < degrees + 5 * (2 * degrees) ** 0.5 + 10
    agree = (tokens[0] == tokens[1]).double().mean().item()  # rows are independent too
    assert abs(agree - (probs**2).sum().item()) < 5 * 0.5 / num_steps**0.5


def test_top_p_and_temperature_are_applied_before_the_draw():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).log_softmax(-1)
    kept = steps_of(logits, 8, 500, top_p=0.85)  # 0.64 + 0.24: two tokens
    frequency = torch.bincount(kept.flatten(), minlength=4) / kept.numel()
    assert frequency[2:].sum() == 0
    assert abs(frequency[0] - torch.tensor([3.0, 2.0]).softmax(-1)[0]) < 0.04
    hot = steps_of(logits, 8, 500, temperature=100.0)
    assert (torch.bincount(hot.flatten()) / hot.numel() - 0.25).abs().max() < 0.04
    assert steps_of(logits, 2, 50, temperature=1e-42).max() == 0


def test_responses_end_at_eos_or_at_the_length(make_policy, tokenizer):
    """The response has EOS once, at its end; the text has none."""
    samples = sample_responses(
        make_policy(0),
        tokenizer,
        PROMPTS,
        num_samples=12,
        temperature=4.0,  # so that EOS comes now and then
        max_new_tokens=40,
        seed=0,
    )
    rows = [sample for row in samples for sample in row]
    reasons = collections.Counter(sample.finish_reason for sample in rows)
    assert min(reasons["eos"], reasons["length"]) > 5
    for sample in rows:
        ended = sample.finish_reason == "eos"
        assert (2 in sample.token_ids) == ended
        assert (sample.token_ids[-1] == 2) == ended
        assert ended or len(sample.token_ids) == 40
        assert sample.text == tokenizer.decode(sample.token_ids, skip_special_tokens=True)


def test_sampled_frequencies_are_the_models_own(make_policy, tokenizer):
    """Against the softmax, by temperature; the model's own generation config has no say."""
    model = make_policy(1)
    model.generation_config.top_k = 2
    model.generation_config.repetition_penalty = 5.0
    own, prompt_ids = model.generation_config, tokenizer(PROMPTS[0])["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids])).logits[0, -1]
    num = 4000
    for temperature in (1.0, 2.0):
        (samples,) = sample_responses(
            model,
            tokenizer,
            PROMPTS[:1],
            num_samples=num,
            temperature=temperature,
            max_new_tokens=1,
            batch_size=num,
            seed=0,
        )
        first = torch.tensor([sample.token_ids[0] for sample in samples])
        frequency = torch.bincount(first, minlength=len(tokenizer)) / num
        probs = (logits / temperature).softmax(-1)
        assert ((frequency - probs).abs() <= 5 * (probs * (1 - probs) / num).sqrt() + 2e-3).all()
    assert model.generation_config is own
    assert own.top_k == 2


def test_top_p_keeps_the_nucleus(make_policy, tokenizer):
    options = {"num_samples": 5, "max_new_tokens": 5, "seed": 3}
    nucleus = sample_responses(make_policy(1), tokenizer, PROMPTS, top_p=1e-6, **options)
    greedy = sample_responses(make_policy(1), tokenizer, PROMPTS, temperature=0, **options)
    assert nucleus == greedy


def test_model_and_tokenizer_are_left_as_they_were(make_policy, tokenizer):
    model = make_policy(0, attention_dropout=0.5)
    model.train()
    model.lm_head.eval()
    sample = {"temperature": 0, "max_new_tokens": 6, "seed": 0}
    once = sample_responses(model, tokenizer, PROMPTS, **sample)
    assert once == sample_responses(model, tokenizer, PROMPTS, **sample)  # dropout was off
    assert model.training
    assert model.model.training
    assert not model.lm_head.training
    assert tokenizer.padding_side == "right"


# peft 0.21 asks transformers 5.23 for an attribute under its old name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_under_an_adapter(make_policy, tokenizer):
    from peft import LoraConfig, get_peft_model

    options = {"num_samples": 4, "max_new_tokens": 6, "seed": 0}
    plain = sample_responses(make_policy(0), tokenizer, PROMPTS, **options)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(make_policy(0), lora)
    own = model.get_base_model().generation_config
    own.top_k = 1
    assert sample_responses(model, tokenizer, PROMPTS, **options) == plain
    assert model.get_base_model().generation_config is own


def test_every_eos_of_the_model_ends_a_response(make_policy, tokenizer):
    model = make_policy(0)
    options = {"temperature": 0, "max_new_tokens": 12, "seed": 0}
    (before,) = sample_responses(model, tokenizer, PROMPTS[:1], **options)[0]
    model.generation_config.eos_token_id = [2, before.token_ids[1]]
    (after,) = sample_responses(model, tokenizer, PROMPTS[:1], **options)[0]
    end = before.token_ids.index(before.token_ids[1]) + 1
    assert after.token_ids == before.token_ids[:end]
    assert after.finish_reason == "eos"


def test_conversations_go_through_the_template(make_policy):
    tokenizer = WORLDS["reviews"].build_tokenizer()
    messages = [{"role": "user", "content": "review of the hotel"}]
    with pytest.raises(TokenRatioError, match="no chat template"):
        encode_prompts(tokenizer, [messages])
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %} {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} :{% endif %}"
    )
    assert encode_prompts(tokenizer, [messages]) == encode_prompts(tokenizer, PROMPTS[:1])
    assert encode_prompts(tokenizer, [messages]) == [tuple(tokenizer(PROMPTS[0])["input_ids"])]
    options = {"keys": ["one"], "max_new_tokens": 3, "seed": 0}
    rows = sample_responses(make_policy(0), tokenizer, [messages], **options)
    assert rows == sample_responses(make_policy(0), tokenizer, PROMPTS[:1], **options)


@pytest.mark.parametrize("family", ["gemma", "llama3", "phi3"])
def test_generation_stops_at_the_templates_end_of_turn(family):
    """Also where neither tokenizer nor generation_config calls it an end."""
    tokenizer = family_tokenizer(family)
    model = tiny_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    turns = [{"role": "user", "content": "ash"}]
    options = {"temperature": 0, "max_new_tokens": 6, "seed": 0}
    ((before,),) = sample_responses(model, tokenizer, [turns], **options)
    # the model's third token takes the end's place in its head
    end = turn_end(tokenizer, TemplateSettings()).token_id
    third = before.token_ids[2]
    assert third not in before.token_ids[:2]
    with torch.no_grad():
        rows = model.lm_head.weight
        rows[[end, third]] = rows[[third, end]]
    ((after,),) = sample_responses(model, tokenizer, [turns], **options)
    assert after.token_ids == (*before.token_ids[:2], end)
    assert (after.finish_reason, before.finish_reason) == ("eos", "length")


def test_bos_stands_once(tokenizer):
    assert encode_prompts(tokenizer, ["<bos> the", "the", ""]) == [(1, 12), (1, 12), (1,)]


def test_policy_sampler_feeds_a_world(make_policy, tokenizer, world):
    def pairs():
        sampler = policy_sampler(make_policy(0), tokenizer, max_new_tokens=6, seed=7)
        return world.preference_pairs(20, seed=0, sampler=sampler)

    assert pairs() == pairs()
    assert all(row["chosen"] != row["rejected"] for row in pairs())
    sampler = policy_sampler(make_policy(0), tokenizer, max_new_tokens=6, seed=7)
    assert sampler(PROMPTS, 2) != sampler(PROMPTS, 2)


def test_no_prompts(make_policy, tokenizer):
    assert sample_responses(make_policy(0), tokenizer, [], max_new_tokens=3, seed=0) == []


@pytest.mark.parametrize(
    "option", [{"num_samples": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"batch_size": 0}]
)
def test_bad_settings_are_named(make_policy, tokenizer, option):
    with pytest.raises(TokenRatioError, match=next(iter(option))):
        sample_responses(
            make_policy(0), tokenizer, PROMPTS, seed=0, **{"max_new_tokens": 3, **option}
        )
