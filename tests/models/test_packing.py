"""A pair in one row against its two rows: every state and the gradients of all parameters."""

import copy
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import nn

from tiny import FAMILIES, tiny_model
from tokenratio.models.packing import SHAREABLE, branch_inputs, why_not_shared
from tokenratio.models.token_requests import TokenRequest, answer_token_requests, disable_dropout

# Prompt, chosen, rejected: unequal rows in both layouts, a prompt and responses of one token. The
# tiny windows below are shorter than most of these rows.
LENGTHS = [(4, 5, 3), (1, 2, 6), (6, 1, 4), (3, 4, 1)]

WINDOWED = {
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "smollm3": {"use_sliding_window": True, "sliding_window": 3},
    "gemma2": {"sliding_window": 3},
    "gemma3": {"sliding_window": 3, "sliding_window_pattern": 2},
}
CASES = {
    **{family: (family, {}) for family in FAMILIES},
    **{f"{family}, windowed": (family, settings) for family, settings in WINDOWED.items()},
    "gemma3, windowed layers only": ("gemma3", {"sliding_window": 3}),
    "llama, grouped queries": ("llama", {"num_key_value_heads": 1}),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
}


def with_attention() -> list:
    """Every case with every attention it can have: Gemma 2's soft-cap rules sdpa out."""
    return [
        pytest.param(name, attention, id=f"{name}-{attention}")
        for name, (family, _) in CASES.items()
        for attention in ("eager", "sdpa")
        if (family, attention) != ("gemma2", "sdpa")
    ]


def build(name: str, attention: str = "sdpa") -> nn.Module:
    family, settings = CASES[name]
    model = tiny_model(family, **settings)
    model.set_attn_implementation(attention)
    disable_dropout(model)
    return model.double().train()


@dataclass
class Rows:
    """Token ids of rows, and where the state stands that predicts each response token."""

    ids: torch.Tensor
    state_rows: list[int]
    state_columns: list[int]


def random_pairs() -> list[list[list[int]]]:
    """Prompt, chosen and rejected ids of every pair."""
    torch.manual_seed(1)
    return [[torch.randint(4, 16, (n,)).tolist() for n in lengths] for lengths in LENGTHS]


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def separate_rows() -> tuple[Rows, torch.Tensor]:
    """Two rows of each pair, padded on the right, and their attention mask."""
    rows, state_rows, state_columns = [], [], []
    for prompt, *responses in random_pairs():
        for response in responses:
            state_rows += [len(rows)] * len(response)
            state_columns += range(len(prompt) - 1, len(prompt) + len(response) - 1)
            rows.append(prompt + response)
    attention_mask = padded([[1] * len(row) for row in rows], 0)
    return Rows(padded(rows, 0), state_rows, state_columns), attention_mask


def shared_rows() -> tuple[Rows, torch.Tensor, torch.Tensor]:
    """One row of each pair, its branches and its positions."""
    rows, branches, positions, state_rows, state_columns = [], [], [], [], []
    for index, (prompt, chosen, rejected) in enumerate(random_pairs()):
        start = len(prompt)
        for response in (chosen, rejected):
            # Both first tokens are predicted by the prompt's last state.
            state_columns += [len(prompt) - 1, *range(start, start + len(response) - 1)]
            state_rows += [index] * len(response)
            start += len(response)
        rows.append(prompt + chosen + rejected)
        branches.append([0] * len(prompt) + [1] * len(chosen) + [2] * len(rejected))
        places = [*range(len(prompt) + max(len(chosen), len(rejected)))]
        rejected_places = places[len(prompt) : len(prompt) + len(rejected)]
        positions.append(places[: len(prompt) + len(chosen)] + rejected_places)
    shared = Rows(padded(rows, 0), state_rows, state_columns)
    return shared, padded(branches, -1), padded(positions, 0)


def states_and_gradients(model, rows: Rows, **inputs) -> tuple[torch.Tensor, dict]:
    """The states that predict the responses, and the gradients of a fixed random sum of them."""
    hidden = model.base_model(input_ids=rows.ids, use_cache=False, **inputs).last_hidden_state
    hidden = hidden[rows.state_rows, rows.state_columns]
    torch.manual_seed(2)
    (hidden * torch.randn(hidden.shape, dtype=torch.float64)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.base_model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return hidden.detach(), gradients


def run_separate(model):
    rows, attention_mask = separate_rows()
    return states_and_gradients(model, rows, attention_mask=attention_mask)


def run_shared(model, change=None, **overrides):
    """The packed run; `change` spoils the backbone's arguments, `overrides` those of the mask."""
    rows, branch, position_ids = shared_rows()
    arguments = {"config": model.config, "branch": branch, "position_ids": position_ids}
    inputs = branch_inputs(**{**arguments, **overrides}, dtype=model.dtype)
    if change:
        change(inputs)
    return states_and_gradients(model, rows, **inputs)


def assert_equal(shared, separate, tolerance: float) -> None:
    """Everything to a relative error of `tolerance`, each tensor by its own largest entry."""
    (states, gradients), (expected_states, expected) = shared, separate
    assert gradients.keys() == expected.keys()
    for name, ours, theirs in [
        ("states", states, expected_states),
        *((name, gradients[name], expected[name]) for name in expected),
    ]:
        assert theirs.abs().max() > 0, name
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error < tolerance, f"{name}: {error:.2g}"


@contextmanager
def float64_throughout():
    """Lets softmax, norms and rotations, written for float32, compute in float64 too.

    Their rounding would hide errors below 1e-6, and float64's lowest value is -inf to them: a row
    of padding whose whole window is padding, as separate rows have, is then nan in eager attention.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def assert_shared_equals_separate(model, change=None, tolerance=1e-11, **overrides) -> None:
    with float64_throughout():
        assert_equal(run_shared(model, change, **overrides), run_separate(model), tolerance)


@pytest.mark.parametrize(("name", "attention"), with_attention())
def test_shared_equals_separate(name, attention):
    model = build(name, attention)
    assert why_not_shared(model) is None
    assert_shared_equals_separate(model)


@pytest.mark.parametrize(("name", "attention"), with_attention())
def test_float32(name, attention):
    model = build(name, attention).float()
    assert_equal(run_shared(model), run_separate(model), 1e-4)


@pytest.mark.parametrize("name", CASES)
def test_gradient_checkpointing(name):
    model = build(name, "eager")
    expected = run_shared(model)
    model.activation_checkpointing_enable()
    backbone, calls = model.base_model, []
    layers = getattr(backbone, "layers", None) or backbone.h
    # Hooks of the layer itself stay outside the checkpoint.
    next(layers[0].children()).register_forward_pre_hook(lambda *_: calls.append(1))
    assert_equal(run_shared(model), expected, 1e-12)
    assert calls == [1, 1], "once forward, once recomputed"


def test_every_shareable_architecture_is_among_the_cases():
    assert {tiny_model(family).config.model_type for family in FAMILIES} == set(SHAREABLE)


# What must fail, so that the equality above says something.


def assert_found(model, change=None, **overrides) -> None:
    """The comparison fails, by far more than rounding and not by nan."""
    with pytest.raises(AssertionError, match=r": \d"):
        assert_shared_equals_separate(model, change, tolerance=1e-3, **overrides)


def boolean(inputs):
    inputs["attention_mask"] = inputs["attention_mask"] == 0


def in_a_row(inputs):
    inputs["position_ids"] = torch.arange(inputs["position_ids"].shape[1])[None]


def one_mask_for_all_layers(inputs):
    inputs["attention_mask"] = inputs["attention_mask"]["full_attention"]


@pytest.mark.parametrize(
    ("name", "attention", "change"),
    [
        ("llama", "eager", boolean),
        ("gpt2", "eager", boolean),
        ("llama", "sdpa", in_a_row),
        ("gpt2", "sdpa", in_a_row),
        ("gemma3, windowed", "sdpa", one_mask_for_all_layers),
        ("gemma2, windowed", "eager", one_mask_for_all_layers),
        ("qwen2, windowed", "sdpa", one_mask_for_all_layers),
        ("qwen3, windowed", "sdpa", one_mask_for_all_layers),
    ],
)
def test_wrong_arguments_are_found(name, attention, change):
    model = build(name, attention)
    assert_found(model, change)


@pytest.mark.parametrize("family", FAMILIES)
def test_rejected_that_sees_chosen_is_found(family):
    model = build(family, "eager")
    branch = shared_rows()[1].clamp_max(1)
    assert_found(model, branch=branch)


@pytest.mark.parametrize("off", [-1, 1])
@pytest.mark.parametrize("family", WINDOWED)
def test_window_off_by_one_is_found(family, off):
    model = build(f"{family}, windowed", "eager")
    config = copy.deepcopy(model.config)
    config.sliding_window += off
    assert_found(model, config=config)


def test_windows_count_positions_not_columns():
    model = build("mistral")
    _, branch, _ = shared_rows()
    columns = torch.arange(branch.shape[1]).expand_as(branch)
    mask = branch_inputs(model.config, branch, columns, torch.float64)["attention_mask"]

    def window_over_columns(inputs):
        inputs["attention_mask"] = mask

    assert_found(model, window_over_columns)


# The masks themselves.


def test_mask_of_one_row():
    branch = torch.tensor([[0, 0, 1, 1, 2, -1]])
    position_ids = torch.tensor([[0, 1, 2, 3, 2, 0]])
    inputs = branch_inputs(tiny_model().config, branch, position_ids, torch.bfloat16)
    mask = inputs["attention_mask"]
    assert mask.dtype == torch.bfloat16
    assert (mask[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]
    assert inputs["position_ids"] is position_ids


def test_a_window_that_hides_nothing_costs_no_mask_of_its_own():
    config = build("gemma3, windowed").config
    branch, position_ids = shared_rows()[1:]
    masks = branch_inputs(config, branch, position_ids, torch.float32)["attention_mask"]
    assert masks["full_attention"] is not masks["sliding_attention"]
    config.sliding_window = branch.shape[1]
    masks = branch_inputs(config, branch, position_ids, torch.float32)["attention_mask"]
    assert masks["full_attention"] is masks["sliding_attention"]


# Precision and adapters.


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("name", "attention"), with_attention())
def test_bfloat16_errs_no_more_than_separate_rows_do(name, attention, autocast):
    model = build(name, attention)
    with float64_throughout():
        states, expected = run_separate(model)
    low = model.float() if autocast else model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = run_shared(low), run_separate(low)

    def error(run) -> torch.Tensor:
        pairs = [(run[0], states), *((run[1][name], expected[name]) for name in expected)]
        return torch.stack([(a - b).norm() / b.norm() for a, b in pairs])

    assert error(ours).isfinite().all()
    assert error(ours).mean() < 1.5 * error(theirs).mean()


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2, windowed"])
def test_through_an_adapter_and_a_token_request(name):
    model = get_peft_model(
        build(name), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).double()
    assert why_not_shared(model) is None
    answer_token_requests(model.get_base_model())
    rows, branch, position_ids = shared_rows()
    two_rows, attention_mask = separate_rows()
    inputs = branch_inputs(model.config, branch, position_ids, torch.float64)
    gradients = []
    for row, arguments in [(rows, inputs), (two_rows, {"attention_mask": attention_mask})]:
        everywhere = TokenRequest(torch.ones_like(row.ids, dtype=torch.bool))
        hidden = model(input_ids=row.ids, token_request=everywhere, **arguments)["hidden"]
        hidden = hidden.unflatten(0, row.ids.shape)[row.state_rows, row.state_columns]
        torch.manual_seed(2)
        (hidden * torch.randn_like(hidden)).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        model.zero_grad(set_to_none=True)
    assert len(gradients[0]) == 8
    empty = torch.ones(1)
    assert_equal((empty, gradients[0]), (empty, gradients[1]), 1e-5)


# Which models may.


def test_other_architectures_are_refused(monkeypatch):
    monkeypatch.setitem(FAMILIES, "bloom", {"model_type": "bloom", "n_head": 2, "n_layer": 1})
    assert "bloom" in why_not_shared(tiny_model("bloom"))


def test_other_attention_is_refused():
    model = tiny_model()
    model.set_attn_implementation("flex_attention")
    assert "flex_attention" in why_not_shared(model)


def test_attention_that_is_not_causal_is_refused():
    model = tiny_model("gemma3")
    model.config.use_bidirectional_attention = True
    assert "causal" in why_not_shared(model)
    model = tiny_model()
    model.config.is_causal = False
    assert "causal" in why_not_shared(model)


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "llama3", "yarn"])
def test_rotary_embeddings_that_follow_the_length_are_refused(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}
    if rope_type in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = 8
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = tiny_model(rope_parameters=rope).double().train()
    reason = why_not_shared(model)
    if rope_type == "dynamic":
        assert "dynamic" in reason
        return
    assert reason is None
    assert_shared_equals_separate(model)


def test_rotary_embeddings_of_one_layer_type_count():
    model = tiny_model("gemma3")
    assert why_not_shared(model) is None
    model.config.rope_parameters["sliding_attention"]["rope_type"] = "longrope"
    assert "longrope" in why_not_shared(model)


def test_adapters_that_do_not_treat_tokens_alike_are_refused():
    virtual = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    assert "PROMPT_TUNING" in why_not_shared(get_peft_model(tiny_model(), virtual))
    activated = LoraConfig(
        task_type=TaskType.CAUSAL_LM, target_modules=["q_proj"], alora_invocation_tokens=[5]
    )
    model = get_peft_model(tiny_model(), activated)
    assert "invocation" in why_not_shared(model)


def test_adapter_added_to_the_model_itself():
    model = tiny_model()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    assert why_not_shared(model) is None
    model.peft_config["default"].alora_invocation_tokens = [5]
    assert "invocation" in why_not_shared(model)
