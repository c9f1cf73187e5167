"""The policy's answer to a token request, against the model's own logits."""

import copy
import inspect
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tiny import FAMILIES, tiny_model
from tokenratio.errors import TokenRatioError
from tokenratio.models.loading import check_model
from tokenratio.models.token_requests import (
    TokenRequest,
    answer_token_requests,
    check_causal,
    check_statistics,
    disable_dropout,
    own_head,
)
from tokenratio.types import CompletionBatch


def batch_of_rows() -> CompletionBatch:
    """Three rows of unequal prompts and responses, padded on the right."""
    lengths = [(2, 5), (4, 1), (1, 3)]
    longest = max(p + r for p, r in lengths)
    torch.manual_seed(1)
    ids = torch.zeros(3, longest, dtype=torch.long)
    attention, completion = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, response) in enumerate(lengths):
        ids[row, : prompt + response] = torch.randint(4, 16, (prompt + response,))
        attention[row, : prompt + response] = 1
        completion[row, prompt : prompt + response] = True
    return CompletionBatch(ids, attention, completion, torch.arange(3))


def own_log_probs(model, batch):
    """Whole logits of the model itself, one row at a time without padding."""
    rows = []
    for ids, attention, completion in zip(
        batch.input_ids, batch.attention_mask.bool(), batch.completion_mask, strict=True
    ):
        logits = model(input_ids=ids[attention][None]).logits[0]
        start = int(completion.nonzero()[0])
        stop = int(completion.nonzero()[-1]) + 1
        rows.append(logits[start - 1 : stop - 1].double().log_softmax(-1))
    return torch.cat(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_answer_is_the_models_own_log_probs_and_gradients(family):
    policy, reference = tiny_model(family).double(), tiny_model(family, seed=1).double()
    twin = copy.deepcopy(policy)
    batch = batch_of_rows()
    for model in (policy, reference):
        answer_token_requests(model)
        disable_dropout(model)
        model.train()
    disable_dropout(twin)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    ref_hidden = reference(**inputs, token_request=TokenRequest(batch.states))["hidden"]
    head = own_head(reference)
    request = TokenRequest(batch.states, batch.labels, ref_hidden.detach(), head, with_kl=True)
    answer = policy(**inputs, token_request=request)
    (answer["log_probs"] + 2 * answer["kl_ref_policy"]).sum().backward()

    log_probs = own_log_probs(twin, batch)
    with torch.no_grad():
        ref_log_probs = own_log_probs(reference, batch)
    labels = batch.labels[:, None]
    kl = (ref_log_probs.exp() * (ref_log_probs - log_probs)).sum(-1)
    (log_probs.gather(-1, labels).squeeze(-1) + 2 * kl).sum().backward()

    torch.testing.assert_close(answer["log_probs"], log_probs.gather(-1, labels).squeeze(-1))
    torch.testing.assert_close(
        answer["ref_log_probs"], ref_log_probs.gather(-1, labels).squeeze(-1)
    )
    torch.testing.assert_close(answer["kl_ref_policy"], kl)
    ours, theirs = dict(policy.named_parameters()), dict(twin.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name].grad, parameter.grad, msg=name)


def test_the_head_is_called_and_builds_no_logits(monkeypatch):
    """Wrappers that shard a model hook into the call."""
    model, calls = tiny_model(), []
    answer_token_requests(model)
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda *_: calls.append(1))

    def forward(self, hidden):
        assert self is not head, "logits were built"
        return torch.nn.functional.linear(hidden, self.weight, self.bias)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    batch = batch_of_rows()
    request = TokenRequest(batch.states, batch.labels)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    assert model(**inputs, token_request=request)["log_probs"].shape == batch.labels.shape
    assert model(**inputs, token_request=TokenRequest(batch.states))["hidden"].ndim == 2
    assert calls == [1, 1]
    assert "forward" not in vars(head)
    with pytest.raises(AssertionError, match="logits were built"):
        model(**inputs)


def test_forward_hooks_of_the_model_run():
    model, calls = tiny_model(), []
    answer_token_requests(model)
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    batch = batch_of_rows()
    model(input_ids=batch.input_ids, token_request=TokenRequest(batch.states))
    assert calls == [1]


def test_signature_stays_and_a_copy_answers_for_itself():
    model = tiny_model()
    signature = inspect.signature(model.forward)
    answer_token_requests(model)
    assert inspect.signature(model.forward) == signature
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_output_embeddings().weight.zero_()
    batch = batch_of_rows()
    request = TokenRequest(batch.states, batch.labels)
    answer = twin(input_ids=batch.input_ids, token_request=request)["log_probs"]
    torch.testing.assert_close(answer, torch.full_like(answer, -torch.tensor(16.0).log().item()))


def test_adapter_on_the_head_is_refused_in_words():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["lm_head", "q_proj"]))
    with pytest.raises(TokenRatioError, match="modules_to_save"):
        check_model(model)


def test_whole_head_as_module_to_save_is_trained_and_off_for_the_reference():
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_model(), config)
    check_model(model)
    base = model.get_base_model()
    trained = own_head(base).weight
    assert trained.requires_grad
    frozen = own_head(base, adapters=False).weight
    assert not frozen.requires_grad
    assert trained is not frozen
    with model.disable_adapter():
        assert own_head(base).weight is frozen
    batch = batch_of_rows()
    with torch.no_grad():
        trained.add_(0.1 * torch.randn_like(trained))
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad(), model.disable_adapter():
        ref_hidden = model(**inputs, token_request=TokenRequest(batch.states))["hidden"]
    answer = model(**inputs, token_request=TokenRequest(batch.states, batch.labels, ref_hidden))
    assert (answer["log_probs"] - answer["ref_log_probs"]).abs().max() > 1e-3
    answer["log_probs"].sum().backward()
    assert trained.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "config", [{"model_type": "granite", "logits_scaling": 8.0}, {"model_type": "cohere"}]
)
def test_head_with_an_unknown_scale_is_refused(config, monkeypatch):
    monkeypatch.setitem(FAMILIES, "scaled", config)
    model = tiny_model("scaled")
    answer_token_requests(model)
    with pytest.raises(TokenRatioError, match="after its last hidden state"):
        check_statistics(model, torch.arange(8)[None])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_the_check(family):
    check_model(tiny_model(family))
    check_model(tiny_model(family).to(torch.bfloat16))


def test_model_that_looks_ahead_is_refused(monkeypatch):
    """Leaving out the tokens past the shorter response would change it."""
    monkeypatch.setitem(FAMILIES, "bert", {"model_type": "bert"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny_model("bert", is_decoder=False)
    answer_token_requests(model)
    with pytest.raises(TokenRatioError, match="not causal"):
        check_causal(model, torch.arange(8)[None])


def test_balancing_loss_of_experts_is_refused(monkeypatch):
    experts = {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}
    monkeypatch.setitem(FAMILIES, "experts", experts)
    check_model(tiny_model("experts"))
    with pytest.raises(TokenRatioError, match="output_router_logits"):
        check_model(tiny_model("experts", output_router_logits=True))


def test_backbone_without_a_head_is_refused():
    with pytest.raises(TokenRatioError, match="output head"):
        answer_token_requests(tiny_model().base_model)


def test_dropout_is_off_but_an_adapters_own_is_kept():
    model = tiny_model("gpt2")
    model = get_peft_model(
        model, LoraConfig(target_modules=["c_attn"], lora_dropout=0.5, fan_in_fan_out=True)
    )
    disable_dropout(model)
    kept = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Dropout) and module.p > 0
    }
    assert kept
    assert all("lora_dropout" in name for name in kept)


def test_the_head_has_its_bias_and_soft_cap():
    head = own_head(tiny_model("phi"))
    assert head.bias.shape == (16,)
    assert head.softcap is None
    model = tiny_model("gemma2")
    model.config.final_logit_softcapping = 7.5
    assert own_head(model).softcap == 7.5
