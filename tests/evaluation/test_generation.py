import collections

import pytest
import torch

from tokenratio.data.worlds import WORLDS
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.generation import encode_prompts, policy_sampler, sample_responses

PROMPTS = [
    "review of the hotel :",
    "note about the old camera for my boss :",
    "the",
    "opinion on the small cruise for the paper :",
    "thoughts on the film :",
]


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
            assert list(sample.prompt_ids) == tokenizer(prompt)["input_ids"]
            assert sample.response_ids == hand_greedy(model, sample.prompt_ids, 12, 2)


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
    assert [row[0].prompt_ids for row in runs[0]] == encode_prompts(tokenizer, PROMPTS)


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
        assert (2 in sample.response_ids) == ended
        assert (sample.response_ids[-1] == 2) == ended
        assert ended or len(sample.response_ids) == 40
        assert sample.text == tokenizer.decode(sample.response_ids, skip_special_tokens=True)


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
        first = torch.tensor([sample.response_ids[0] for sample in samples])
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
    model.generation_config.eos_token_id = [2, before.response_ids[1]]
    (after,) = sample_responses(model, tokenizer, PROMPTS[:1], **options)[0]
    end = before.response_ids.index(before.response_ids[1]) + 1
    assert after.response_ids == before.response_ids[:end]
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
    rows = sample_responses(make_policy(0), tokenizer, [messages], max_new_tokens=3, seed=0)
    assert rows[0][0].prompt_ids == tuple(tokenizer(PROMPTS[0])["input_ids"])


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
