"""A starting policy with an adapter: part of policy and reference, by every way in."""

import copy
import json
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio import TokenRatioConfig, TokenRatioTrainer
from tokenratio.errors import TokenRatioError
from tokenratio.models.adapter_checks import sample_log_probs
from tokenratio.models.adapters import load_adapter, merge_adapters
from tokenratio.models.loading import load_model, load_tokenizer
from tokenratio.models.provenance import origin_of
from tokenratio.models.reference import model_digest
from tokenratio.training.adapter_settings import SUPPORTED, peft_config_of

NEW = {"r": 2, "target_modules": "all-linear"}
LINEAR = ["q_proj", "down_proj"]
# Kinds of adapters that an SFT run may have left behind.
SFT = {
    "lora": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    "dora": LoraConfig(r=2, target_modules=LINEAR, use_dora=True, init_lora_weights=False),
    "head": LoraConfig(r=2, target_modules=LINEAR, modules_to_save=["lm_head", "norm"]),
}
WAYS = ("folder", "path", "peft_model", "named", "from_pretrained", "load_adapter")


def settings(folder, **overrides):
    return TokenRatioConfig(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "report_to": "none",
            "max_length": 32,
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "loss": "dpo",
            "max_steps": 2,
            **overrides,
        }
    )


def trainer_of(model, folder, *, peft_config=None, ref_model=None, callbacks=None, **overrides):
    return TokenRatioTrainer(
        model,
        ref_model,
        settings(folder, **overrides),
        word_pairs(16),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
        callbacks=callbacks,
    )


def moved(model, *, seed=3):
    """All that is trainable as if it had been trained."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_sft(base, folder, kind="lora"):
    """A trained adapter on `base`, saved by PEFT alone."""
    config = copy.deepcopy(SFT[kind])
    config.task_type = "CAUSAL_LM"
    model = moved(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config))
    model.save_pretrained(folder)
    return folder


def by_plain_peft(folder):
    """What anybody gets who loads an adapter's folder with transformers and PEFT."""
    where = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(where), folder)


def way_in(way, base, sft):
    plain = AutoModelForCausalLM.from_pretrained(base)
    if way == "folder":
        return str(sft)
    if way == "path":
        return sft
    if way == "peft_model":
        return PeftModel.from_pretrained(plain, sft)
    if way == "named":
        return PeftModel.from_pretrained(plain, sft, adapter_name="sft", is_trainable=True)
    if way == "from_pretrained":
        return AutoModelForCausalLM.from_pretrained(sft)
    plain.load_adapter(str(sft), adapter_name="chat")
    return plain


def reference_log_probs(trainer):
    if trainer.reference.model is not None:
        return sample_log_probs(trainer.reference.model)
    with trainer.model.disable_adapter():
        return sample_log_probs(trainer.model)


@pytest.mark.parametrize("kind", SFT)
@pytest.mark.parametrize("new", [None, NEW], ids=["further", "new"])
@pytest.mark.parametrize("way", WAYS)
def test_policy_and_reference_start_with_the_adapter(way, new, kind, base, tmp_path):
    sft = save_sft(base, tmp_path / "sft", kind)
    given = way_in(way, base, sft)
    # transformers' own loading does not find the magnitudes of a DoRA: an object is what it says.
    as_object = by_plain_peft(sft) if way in ("folder", "path") else given
    expected = sample_log_probs(as_object)
    plain = sample_log_probs(AutoModelForCausalLM.from_pretrained(base))
    assert (expected - plain).abs().max() > 0.1
    trainer = trainer_of(given, tmp_path / "run", peft_config=new)
    torch.testing.assert_close(sample_log_probs(trainer.model), expected)
    torch.testing.assert_close(reference_log_probs(trainer), expected)
    assert list(trainer.model.peft_config) == ["default"]

    trainer.train()
    trainer.save_model()
    trained = sample_log_probs(trainer.model)
    assert (trained - expected).abs().max() > 1e-2
    torch.testing.assert_close(reference_log_probs(trainer), expected)
    reloaded = by_plain_peft(tmp_path / "run")
    torch.testing.assert_close(sample_log_probs(reloaded), trained)
    torch.testing.assert_close(sample_log_probs(load_model(tmp_path / "run")), trained)
    assert load_tokenizer(tmp_path / "run").get_vocab() == tiny_tokenizer().get_vocab()


@pytest.mark.parametrize("new", [None, NEW], ids=["further", "new"])
def test_run_file_names_the_adapter_and_its_digest_follows_the_weights(new, base, tmp_path):
    digests = set()
    for seed in (3, 4):
        config = LoraConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        sft = tmp_path / f"sft{seed}"
        moved(model, seed=seed).save_pretrained(sft)
        trainer = trainer_of(str(sft), tmp_path / "run", peft_config=new)
        trainer.train()
        run = json.loads((tmp_path / "run" / "run.json").read_text())
        assert run["model"] == str(sft)
        assert run["starts_from"] == {
            "path": str(sft),
            "base": str(base),
            "adapters": [str(sft)],
        }
        assert run["reference"]["adapters"] == [str(sft)]
        assert run["reference"]["base"] == str(base)
        # What it names says what the reference said.
        found = load_model(run["reference"]["name"])
        torch.testing.assert_close(sample_log_probs(found), reference_log_probs(trainer))
        assert model_digest(found) == run["reference"]["sha256"]
        digests.add(run["reference"]["sha256"])
    assert len(digests) == 2


@pytest.mark.parametrize("new", [None, NEW], ids=["further", "new"])
@pytest.mark.parametrize("way", ["folder", "load_adapter"])
def test_resuming_goes_on_from_the_adapter_and_refuses_another(way, new, base, tmp_path):
    sft = save_sft(base, tmp_path / "sft")
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(way_in(way, base, sft), tmp_path / "run", peft_config=new, **steps)
    whole.train()
    again = trainer_of(way_in(way, base, sft), tmp_path / "run", peft_config=new, **steps)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    lost = trainer_of(str(base), tmp_path / "run", peft_config=new or NEW, **steps)
    with pytest.raises(TokenRatioError, match=r"the reference is not|began with"):
        lost.train(resume_from_checkpoint=True)


def test_checkpoints_load_in_plain_peft(base, tmp_path):
    sft = save_sft(base, tmp_path / "sft")
    trainer = trainer_of(
        str(sft), tmp_path / "run", peft_config=NEW, save_strategy="steps", save_steps=2
    )
    trainer.train()
    expected = sample_log_probs(trainer.model)
    reloaded = by_plain_peft(tmp_path / "run" / "checkpoint-2")
    torch.testing.assert_close(sample_log_probs(reloaded), expected)
    # The base is a model like any other.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "base")
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert not list((tmp_path / "run").glob(".base*"))


def test_base_of_another_run_in_the_folder_is_replaced(base, tmp_path):
    for kind in ("lora", "head"):
        sft = save_sft(base, tmp_path / kind, kind)
        trainer = trainer_of(str(sft), tmp_path / "run", peft_config=NEW)
        trainer.train()
        trainer.save_model()
        trained = sample_log_probs(trainer.model)
        torch.testing.assert_close(sample_log_probs(by_plain_peft(tmp_path / "run")), trained)


@pytest.mark.parametrize("new", [None, NEW], ids=["further", "new"])
def test_losing_the_adapter_is_noticed(new, base, tmp_path, monkeypatch):
    """As transformers' own loading once did: a new adapter of the same name replaced it."""
    sft = save_sft(base, tmp_path / "sft")
    bare = AutoModelForCausalLM.from_pretrained(base)
    if new is not None:
        monkeypatch.setattr("tokenratio.training.policy_setup.merge_adapters", lambda _: bare)
    else:
        fresh = get_peft_model(bare, LoraConfig(target_modules=LINEAR))
        monkeypatch.setattr("tokenratio.training.policy_setup.as_peft_model", lambda _: fresh)
    with pytest.raises(TokenRatioError, match="nats from those of the model given"):
        trainer_of(str(sft), tmp_path / "run", peft_config=new)


def test_a_fresh_adapter_of_the_users_is_switched_off_for_the_reference(base, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(base)
    trainer = trainer_of(get_peft_model(plain, LoraConfig(**NEW)), tmp_path / "run")
    assert trainer.reference.model is None
    assert trainer.reference.description == f"the policy with its adapter off ({base})"
    trainer.train()


def test_the_frozen_copy_shares_the_base_and_nothing_else(base, tmp_path):
    trainer = trainer_of(str(save_sft(base, tmp_path / "sft")), tmp_path / "run")
    policy = dict(trainer.model.get_base_model().named_parameters())
    for name, parameter in trainer.reference.model.named_parameters():
        assert (parameter is policy[name]) == ("lora_" not in name), name
        assert not parameter.requires_grad


@pytest.mark.parametrize("loss", ["tbpo_a", "tbpo_q", "dpo"])
def test_a_cached_reference_is_that_of_the_adapter(loss, base, tmp_path):
    sft = save_sft(base, tmp_path / "sft")
    for new in (None, NEW):
        trainer = trainer_of(
            str(sft),
            tmp_path / "run",
            peft_config=new,
            loss=loss,
            cache_reference=True,
            reference_cache_dir=str(tmp_path / "cache"),
            baseline_hidden_size=8,
        )
        trainer.train()  # policy and cache are compared before the first update


def test_an_adapter_is_a_reference_too(base, tmp_path):
    sft = save_sft(base, tmp_path / "sft")
    trainer = trainer_of(str(sft), tmp_path / "run", ref_model=str(sft))
    trainer.train()
    by_object = trainer_of(str(sft), tmp_path / "run", ref_model=way_in("peft_model", base, sft))
    by_object.train()
    with pytest.raises(TokenRatioError, match="differ before the first update"):
        trainer_of(str(sft), tmp_path / "run", ref_model=str(base)).train()


def test_sft_goes_on_from_an_adapter(base, tmp_path):
    sft = save_sft(base, tmp_path / "sft")
    expected = sample_log_probs(by_plain_peft(sft))
    for new in (None, NEW):
        trainer = trainer_of(str(sft), tmp_path / "run", peft_config=new, loss="sft")
        torch.testing.assert_close(sample_log_probs(trainer.model), expected)
        trainer.train()
        trainer.save_model()
        reloaded = by_plain_peft(tmp_path / "run")
        torch.testing.assert_close(sample_log_probs(reloaded), sample_log_probs(trainer.model))


def test_a_chain_of_adapters_is_loaded_whole(base, tmp_path):
    first = save_sft(base, tmp_path / "first")
    model = get_peft_model(load_model_merged(first), LoraConfig(r=2, target_modules=["q_proj"]))
    moved(model, seed=5).save_pretrained(tmp_path / "second")
    expected = sample_log_probs(model)
    path = tmp_path / "second" / "adapter_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(first)})
    )
    loaded = load_model(tmp_path / "second")
    torch.testing.assert_close(sample_log_probs(loaded), expected)
    assert origin_of(loaded).adapters == (str(first), str(tmp_path / "second"))
    trainer = trainer_of(str(tmp_path / "second"), tmp_path / "run")
    torch.testing.assert_close(reference_log_probs(trainer), expected)
    trainer.train()
    trainer.save_model()
    reloaded = by_plain_peft(tmp_path / "run")
    torch.testing.assert_close(sample_log_probs(reloaded), sample_log_probs(trainer.model))


def load_model_merged(folder):
    return merge_adapters(load_model(folder))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": LINEAR, "use_dora": True},
        {"target_modules": LINEAR, "use_rslora": True, "rank_pattern": {"q_proj": 3}},
    ],
    ids=lambda lora: " ".join(map(str, lora.values())),
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
def test_merging_changes_nothing_that_is_said(lora, dtype, tmp_path):
    """Also where the output head is tied to the embeddings and one of them was adapted."""
    for family in ("llama", "llama_tied"):
        model = tiny_model(family).to(dtype)
        model = moved(get_peft_model(model, LoraConfig(r=4, **lora)))
        expected = sample_log_probs(model)
        merged = merge_adapters(model)
        torch.testing.assert_close(sample_log_probs(merged), expected)
        assert not any("lora" in name for name, _ in merged.named_parameters())
        merged.save_pretrained(tmp_path / family)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / family)
        torch.testing.assert_close(sample_log_probs(loaded), expected)


def test_what_rounding_loses_of_an_adapter_is_said(caplog):
    model = get_peft_model(tiny_model().bfloat16(), LoraConfig(r=4, target_modules=LINEAR))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(1e-2)
    with caplog.at_level(logging.WARNING):
        merged = merge_adapters(model)
    assert merged.dtype == torch.bfloat16
    assert "rounding to bfloat16 loses" in caplog.text
    caplog.clear()
    merge_adapters(moved(get_peft_model(tiny_model(), LoraConfig(**NEW))))
    assert caplog.text == ""


def test_a_quantised_base_is_not_merged(base, tmp_path):
    model = way_in("peft_model", base, save_sft(base, tmp_path / "sft"))
    model.get_base_model().hf_quantizer = object()
    with pytest.raises(TokenRatioError, match="cannot be merged into a quantised model"):
        trainer_of(model, tmp_path / "run", peft_config=NEW)


def test_adapters_at_odds_are_refused(base, tmp_path):
    sft = save_sft(base, tmp_path / "sft")
    both = way_in("peft_model", base, sft)
    both.load_adapter(sft, "other")
    both.base_model.set_adapter(["default", "other"])
    with pytest.raises(TokenRatioError, match=r"several active adapters \(default, other\)"):
        trainer_of(both, tmp_path / "run")
    off = way_in("from_pretrained", base, sft)
    off.disable_adapters()
    with pytest.raises(TokenRatioError, match="switched off"):
        trainer_of(off, tmp_path / "run", peft_config=NEW)
    with pytest.raises(TokenRatioError, match="does not belong to"):
        load_adapter(tiny_model(num_hidden_layers=1), str(sft), {})
    with pytest.raises(TokenRatioError, match="which the run starts from"):
        trainer_of(str(sft), sft, peft_config=NEW)


# --- other kinds ----------------------------------------------------------------------------------

SMALL = {
    "BOFT": {"boft_block_size": 4},
    "OFT": {"oft_block_size": 4},
    "MISS": {"r": 4},
    "SHIRA": {"r": 4},
    "IA3": {"feedforward_modules": ["down_proj"]},
}


@pytest.mark.parametrize("kind", sorted(SUPPORTED))
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_every_supported_kind_trains_switches_off_saves_and_merges(kind, base, tmp_path):
    peft = {"peft_type": kind.lower(), **SMALL.get(kind, {})}
    if kind != "LN_TUNING":
        peft["target_modules"] = LINEAR
    expected = sample_log_probs(AutoModelForCausalLM.from_pretrained(base))
    trainer = trainer_of(str(base), tmp_path / "run", peft_config=peft, max_steps=3)
    assert trainer.model.active_peft_config.peft_type.value == kind
    trainer.train()
    trainer.save_model()
    trained = sample_log_probs(trainer.model)
    assert (trained - expected).abs().max() > 1e-3
    torch.testing.assert_close(reference_log_probs(trainer), expected)
    loaded = load_model(tmp_path / "run")
    torch.testing.assert_close(sample_log_probs(loaded), trained)
    merged = sample_log_probs(merge_adapters(loaded))
    torch.testing.assert_close(merged, trained, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        ({"init_lora_weights": "pissa"}, "'pissa' changes the weights under the adapter"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "loftq"),
        ({"init_lora_weights": "eva"}, "needs a pass over data"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}, "prompt learning"),
        ({"peft_type": "P_TUNING", "num_virtual_tokens": 2}, "prompt learning"),
        ({"peft_type": "ADALORA", "total_step": 9}, "ADALORA is not supported"),
        ({"peft_type": "XLORA"}, "XLORA is not supported"),
        ({"peft_type": "lorra"}, "unknown peft_type 'LORRA'"),
        ({"rank": 4}, "peft: LORA has no setting 'rank'"),
        ({"peft_type": "IA3", "r": 4}, "peft: IA3 has no setting 'r'"),
        ({"targt_modules": "all-linear"}, "did you mean 'target_modules'"),
        ({"r": 0}, "peft"),
        ({"target_modules": ["nothing"]}, "does not fit the model"),
    ],
)
def test_settings_that_would_go_wrong_are_refused(peft, message, base, tmp_path):
    with pytest.raises(TokenRatioError, match=message):
        trainer_of(str(base), tmp_path / "run", peft_config=peft)
    assert not list((tmp_path / "run").glob("*"))


@pytest.mark.parametrize(
    "peft",
    [
        {"target_modules": "all-linear", "lora_alpha": 16},
        {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
        {"target_modules": r".*\.(q|v)_proj", "init_lora_weights": "orthogonal", "r": 4},
        {"peft_type": "LORA", "task_type": "CAUSAL_LM", "use_rslora": True},
    ],
)
def test_a_dict_is_a_configuration(peft, base, tmp_path):
    trainer = trainer_of(str(base), tmp_path / "run", peft_config=peft)
    config = trainer.model.active_peft_config
    assert isinstance(config, LoraConfig)
    assert config.task_type == "CAUSAL_LM"
    trainer.train()


def test_a_configuration_can_be_used_twice(base, tmp_path):
    config = LoraConfig(**NEW)
    for name in ("a", "b"):
        trainer_of(str(base), tmp_path / name, peft_config=config).train()
    assert config.base_model_name_or_path is None
    assert peft_config_of(config) is config


def test_the_tokenizer_may_be_a_name(base, tmp_path):
    for name in (str(base), base):
        trainer = TokenRatioTrainer(
            str(base), None, settings(tmp_path / "run"), word_pairs(4), processing_class=name
        )
        assert trainer.processing_class.get_vocab() == tiny_tokenizer().get_vocab()
    with pytest.raises(TokenRatioError, match="there is no such folder"):
        TokenRatioTrainer(
            str(base), None, settings(tmp_path / "run"), word_pairs(4), processing_class="./no"
        )


def test_a_model_that_is_nowhere_on_disk_is_saved_with_its_adapter(tmp_path):
    trainer = trainer_of(tiny_model(), tmp_path / "run", peft_config=NEW)
    trainer.train()
    trainer.save_model()
    reloaded = by_plain_peft(tmp_path / "run")
    torch.testing.assert_close(sample_log_probs(reloaded), sample_log_probs(trainer.model))


def merged_by_peft(base, sft):
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), sft
    ).merge_and_unload()


def trained_since(base, sft):
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] += 5.0
    return model


def with_more_tokens(base, sft):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(20, mean_resizing=False)
    return model


def a_new_adapter_on_it(base, sft):
    return get_peft_model(
        merged_by_peft(base, sft), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    )


@pytest.mark.parametrize(
    "change", [merged_by_peft, trained_since, with_more_tokens, a_new_adapter_on_it]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_changed_since_it_was_loaded_is_saved_with_its_adapter(
    change, dtype, base, tmp_path, caplog
):
    """Its name says where it came from; what is there now is another model."""
    sft = save_sft(base, tmp_path / "sft")
    stored = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    stored.save_pretrained(base)
    peft_config = None if change is a_new_adapter_on_it else NEW
    model = change(base, sft).float()
    trainer = trainer_of(model, tmp_path / "run", peft_config=peft_config)
    trainer.train()
    trainer.save_model()
    again = by_plain_peft(tmp_path / "run")
    torch.testing.assert_close(sample_log_probs(again), sample_log_probs(trainer.model))
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert "changes made after it was loaded" in record["starts_from"]["adapters"]
    assert f"the model differs from {base}" in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama_tied", "gpt_neox", "gemma2"])
def test_a_model_as_it_was_loaded_is_not_saved_again(architecture, dtype, tmp_path):
    tiny_model(architecture).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    trainer_of(model, tmp_path / "run", peft_config=NEW).save_model()
    assert not (tmp_path / "run/base").exists()
    config = json.loads((tmp_path / "run/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


def test_a_model_without_a_weight_to_train_is_refused(base, tmp_path):
    model = merged_by_peft(base, save_sft(base, tmp_path / "sft"))
    with pytest.raises(TokenRatioError, match="every weight of the model is frozen"):
        trainer_of(model, tmp_path / "run")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("more", [3, 9])
def test_an_adapter_trained_with_more_tokens(tmp_path, tied, more):
    folder, sft = tmp_path / "base", tmp_path / "sft"
    tiny_model(tie_word_embeddings=tied).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    grown = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    grown.resize_token_embeddings(grown.config.vocab_size + more, mean_resizing=False)
    whole = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    config = LoraConfig(r=2, target_modules=LINEAR, modules_to_save=whole, ensure_weight_tying=tied)
    adapted = moved(get_peft_model(grown, config))
    with pytest.warns(UserWarning, match="resized"):
        adapted.save_pretrained(sft)
    tiny_tokenizer().save_pretrained(sft)
    loaded = load_model(sft)
    ids = torch.arange(7)[None]
    assert loaded.get_input_embeddings().weight.shape[0] == tiny_model().config.vocab_size + more
    torch.testing.assert_close(loaded(ids).logits, adapted.eval()(ids).logits)
    trainer = trainer_of(str(sft), tmp_path / "run", peft_config=LoraConfig(**NEW))
    trainer.train()
    trainer.save_model()
    again = load_model(tmp_path / "run")
    torch.testing.assert_close(again(ids).logits, trainer.model.eval()(ids).logits)


def test_an_adapter_with_more_tokens_on_one_side_is_refused(tmp_path, base):
    grown = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    grown.resize_token_embeddings(grown.config.vocab_size + 3, mean_resizing=False)
    config = LoraConfig(r=2, target_modules=LINEAR, modules_to_save=["lm_head"])
    sft = tmp_path / "sft"
    get_peft_model(grown, config).save_pretrained(sft, save_embedding_layers=False)
    with pytest.raises(TokenRatioError, match="rows of the head"):
        load_model(sft)
