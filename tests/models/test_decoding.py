"""What a batch does not compute: a prompt for every sample, and rows that have ended."""

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model

from tiny import FAMILIES, tiny_model, tiny_tokenizer
from tokenratio.models.decoding import generate_rows
from tokenratio.models.generation import encode_prompts
from tokenratio.models.sampling import RowSampler, nucleus_threshold, stream_seed

END = 2
# What their layers remember cannot be taken from the cache row by row: it lies elsewhere in the
# cache, beside keys and values, in the model itself, or instead of any key.
RECURRENT = {
    "lfm2": {
        "layer_types": ["conv", "full_attention"],
        "block_ff_dim": 32,
        "block_multiple_of": 8,
    },
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
        "head_dim": 8,
    },
    "recurrent_gemma": {
        "lru_width": 16,
        "attention_window_size": 4,
        "block_types": ["recurrent", "attention"],
    },
    "mamba": {"state_size": 8},
}
PROMPTS = ["ash bay", "cow dew elm fig", "gum hay ivy", "jam kin", "log ash cow elm gum ivy"]


def sample(model, prompts, rows, *, size=64, max_new_tokens=12):
    """Each row's tokens up to its end, in batches of `size` rows."""
    found = []
    for start in range(0, len(rows), size):
        batch = range(start, min(start + size, len(rows)))
        asked = sorted({rows[row] for row in batch})
        found += generate_rows(
            model,
            [prompts[number] for number in asked],
            [asked.index(rows[row]) for row in batch],
            ends=[END],
            pad_id=0,
            max_new_tokens=max_new_tokens,
            sampler=RowSampler(
                [stream_seed(0, "row", row) for row in batch], temperature=1.0, top_p=1.0
            ),
        )
    return [ids[: ids.index(END) + 1] if END in ids else ids for ids in found]


def rows_computed(model, monkeypatch):
    """The shape of every batch that the model's layers see."""
    shapes = []
    forward = model.model.layers[0].forward

    def spy(hidden, *args, **kwargs):
        shapes.append(tuple(hidden.shape[:2]))
        return forward(hidden, *args, **kwargs)

    monkeypatch.setattr(model.model.layers[0], "forward", spy)
    return shapes


@pytest.fixture
def prompts():
    return encode_prompts(tiny_tokenizer(), PROMPTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_those_of_batches_of_one(family, prompts):
    """Rows end at different steps, so the rest goes on with what was kept of the cache."""
    model = tiny_model(family)
    rows = [number for number in range(len(prompts)) for _ in range(6)]
    found = sample(model, prompts, rows)
    assert found == sample(model, prompts, rows, size=1)
    ended = {len(ids) for ids in found if ids[-1] == END}
    assert len(ended) > 2
    assert any(ids[-1] != END for ids in found)


@pytest.mark.parametrize("model_type", RECURRENT)
def test_rows_of_recurrent_models_are_those_of_batches_of_one(model_type):
    model = tiny_model(model_type=model_type, **RECURRENT[model_type])
    prompts = [(5, 6, 7, 8, 9, 10), (9, 8, 7, 6, 5, 4)]  # padding is the model's own affair
    rows = [0] * 6 + [1] * 6
    found = sample(model, prompts, rows)
    assert found == sample(model, prompts, rows, size=1)
    assert len({len(ids) for ids in found}) > 1


def test_an_activated_lora_sees_its_invocation_tokens():
    """It is on from the first of them, which are only found if none is missing."""
    lora = LoraConfig(
        r=4,
        target_modules=["q_proj", "k_proj", "v_proj"],
        task_type=TaskType.CAUSAL_LM,
        alora_invocation_tokens=[7, 8],
    )
    model = get_peft_model(tiny_model(), lora)
    rng = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.5, generator=rng)
    prompts, rows = [(5, 6, 7, 8), (4, 7, 8)], [0] * 6 + [1] * 6
    assert sample(model, prompts, rows) == sample(model, prompts, rows, size=1)


def test_a_prompt_is_computed_once_and_a_row_that_ended_no_more(prompts, monkeypatch):
    model = tiny_model()
    shapes = rows_computed(model, monkeypatch)
    rows = [number for number in range(len(prompts)) for _ in range(6)]
    found = sample(model, prompts, rows)
    longest = max(map(len, prompts))
    assert shapes[0] == (len(prompts), longest - 1)
    assert all(length == 1 for _, length in shapes[1:])
    # A step runs fewer than 4/3 of the rows that still go on.
    steps = [sum(len(ids) > step for ids in found) for step in range(12)]
    computed = [num for num, _ in shapes[1:]]
    assert len(computed) == sum(going > 0 for going in steps)
    assert computed[0] == len(rows)
    for num, going in zip(computed, steps, strict=False):
        assert going <= num < going / 0.75
    shapes.clear()
    sample(model, prompts, list(range(len(prompts))))  # a sample for each prompt: nothing to share
    assert shapes[0] == (len(prompts), longest)


def test_a_prompt_of_one_token_is_not_shared(monkeypatch):
    model = tiny_model()
    shapes = rows_computed(model, monkeypatch)
    assert len(sample(model, [(1,), (4, 5)], [0, 0, 1, 1], max_new_tokens=1)) == 4
    assert shapes == [(4, 2)]


@pytest.mark.parametrize("scale", [0.0, 0.1, 4.0])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 1 - 1e-7])
def test_the_nucleus_is_the_smallest_set_with_the_mass(scale, top_p):
    """Token by token, from the likeliest; a flat distribution needs more than are sorted at first.

    Without differences between tokens, all are as likely as the last one, and all stay.
    """
    logits = scale * torch.randn(3, 3000, generator=torch.Generator().manual_seed(0))
    probs = (torch.tensor([[1.0], [0.1], [2.0]]) * logits).double().softmax(-1)
    for row, threshold in zip(probs, nucleus_threshold(probs, top_p), strict=True):
        mass = 0.0
        for last in row.sort(descending=True).values.tolist():
            mass += last
            if mass >= top_p:
                break
        assert threshold.item() == last
    alone = [nucleus_threshold(row[None], top_p) for row in probs]
    assert torch.equal(torch.cat(alone), nucleus_threshold(probs, top_p))


@pytest.mark.parametrize("vocabulary", [9, 5000])  # many steps drawn at once, and one
@pytest.mark.parametrize("before", [0, 1, 3])
def test_streams_continue_for_the_rows_that_are_kept(vocabulary, before):
    logits = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(0))
    whole, some = (RowSampler([5, 6, 7, 8], temperature=1.0, top_p=1.0) for _ in range(2))
    for _ in range(before):
        assert torch.equal(whole(None, logits), some(None, logits))
    some.keep(torch.tensor([0, 2, 3]))
    some.keep(torch.tensor([2, 1]))
    for _ in range(3):
        assert torch.equal(whole(None, logits)[[3, 2]], some(None, logits[[3, 2]]))
