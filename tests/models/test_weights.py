"""Files whose weights do not fit the model are refused by name, wherever a model is loaded."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from tiny import FAMILIES, tiny_model, tiny_tokenizer, word_pairs
from tokenratio import TokenRatioConfig, TokenRatioTrainer
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.judges.reward_model import RewardModelJudge
from tokenratio.models.loading import load_model
from tokenratio.models.reward_model import load_reward_model


def change(path, edit):
    """Rewrite a file of weights with what `edit` makes of them."""
    save_file(edit(load_file(path)), path, metadata={"format": "pt"})


def without(name):
    return lambda weights: {key: value for key, value in weights.items() if key != name}


def prefixed(weights):
    return {f"policy.{key}": value for key, value in weights.items()}


def with_other(weights):
    return {**weights, "v_head.weight": torch.zeros(2)}


@pytest.fixture
def folder(tmp_path):
    def make(family="llama", edit=None):
        tiny_model(family).save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
        if edit is not None:
            change(tmp_path / "model" / "model.safetensors", edit)
        return tmp_path / "model"

    return make


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (without(UP), f"it has no weights for {UP}"),
        (
            prefixed,
            r"it has no weights for lm_head.weight, .* more, and the model has no place",
        ),
        (with_other, "the model has no place for its v_head.weight"),
        (without("lm_head.weight"), "it has no weights for lm_head.weight"),
    ],
)
def test_a_policy_is_refused(edit, said, folder):
    with pytest.raises(TokenRatioError, match=f"cannot load model .*model': {said}"):
        load_model(folder(edit=edit))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_whole(family, folder):
    """Also where the head is tied and not in the file, and with buffers that are not saved."""
    load_model(folder(family))
    load_reward_model(folder(family), seed=0)


def test_a_tied_head_needs_the_embeddings(folder):
    path = folder("llama_tied", without("model.embed_tokens.weight"))
    with pytest.raises(TokenRatioError, match=r"no weights for .*embed_tokens\.weight"):
        load_model(path)


def test_a_smaller_configuration_does_not_drop_layers(folder):
    path = folder()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    for load in (load_model, lambda path: load_reward_model(path, seed=0)):
        with pytest.raises(TokenRatioError, match=r"no place for its model\.layers\.1"):
            load(path)


def test_a_reward_model_starts_with_a_new_head_and_a_whole_body(folder, tmp_path):
    path = folder()
    model = load_reward_model(path, seed=0)
    with pytest.raises(TokenRatioError, match="as a reward model: it has no weights for score"):
        RewardModelJudge.load(path)
    model.save_pretrained(tmp_path / "reward")
    tiny_tokenizer().save_pretrained(tmp_path / "reward")
    with pytest.raises(TokenRatioError, match=r"no weights for lm_head.* no place for its score"):
        load_model(tmp_path / "reward")
    RewardModelJudge.load(tmp_path / "reward")
    for name in ("reward", "model"):
        change(tmp_path / name / "model.safetensors", without(UP))
        with pytest.raises(TokenRatioError, match=f"no weights for {UP}"):
            load_reward_model(tmp_path / name, seed=0)


def test_the_base_of_an_adapter_is_whole(folder, tmp_path):
    path = folder()
    adapted = trainer(tmp_path / "run", str(path), peft_config=LoraConfig(r=2))
    adapted.save_model()
    load_model(tmp_path / "run")
    change(path / "model.safetensors", without(UP))
    with pytest.raises(TokenRatioError, match=f"the base of the adapter .*no weights for {UP}"):
        load_model(tmp_path / "run")


def trainer(folder, model, **arguments):
    args = TokenRatioConfig(
        str(folder), max_steps=2, save_steps=1, use_cpu=True, disable_tqdm=True, max_length=32
    )
    return TokenRatioTrainer(
        model,
        args=args,
        train_dataset=word_pairs(8),
        processing_class=tiny_tokenizer(),
        **arguments,
    )


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2)], ids=["whole", "adapter"])
def test_a_checkpoint_is_whole(peft_config, tmp_path):
    trainer(tmp_path / "run", tiny_model(), peft_config=peft_config).train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    (tmp_path / "run" / "checkpoint-1" / "manifest.json").unlink(missing_ok=True)
    (path,) = (tmp_path / "run" / "checkpoint-1").glob("*model.safetensors")
    name = sorted(load_file(path))[-1]
    whole = path.read_bytes()
    for edit, said in ((without(name), "no weights for"), (with_other, "no place for its v_head")):
        path.write_bytes(whole)
        change(path, edit)
        with pytest.raises(TokenRatioError, match=said):
            trainer(tmp_path / "run", tiny_model(), peft_config=peft_config).train(True)
    path.write_bytes(whole)
    trainer(tmp_path / "run", tiny_model(), peft_config=peft_config).train(True)
