"""Where an adapter's base is found, and when a name is not looked up on the hub."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio import TokenRatioConfig, TokenRatioTrainer
from tokenratio.errors import TokenRatioError
from tokenratio.models.adapter_checks import sample_log_probs
from tokenratio.models.loading import load_config, load_model, load_tokenizer
from tokenratio.models.provenance import chain_of


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """Nothing here may ask the hub."""
    asked = []

    def refuse(*args, **named):
        asked.append((args, named))
        raise OSError("the hub was asked")

    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(f"transformers.utils.hub.{name}", refuse)
    monkeypatch.setattr("huggingface_hub.utils._http.http_backoff", refuse)
    monkeypatch.setattr("huggingface_hub.file_download.http_backoff", refuse, raising=False)
    yield
    assert not asked


def write_base(folder):
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def write_adapter(folder, base, name):
    """An adapter on the model in `base`, by another tool, which names it `name`."""
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with a model, which is the working directory."""
    folder = tmp_path / "project"
    write_base(folder / "models" / "sft")
    monkeypatch.chdir(folder)
    return folder


def train(project, model, output="run", peft=None):
    trainer = TokenRatioTrainer(
        model,
        args=TokenRatioConfig(
            output_dir=output,
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
            max_length=32,
            loss="dpo",
            max_steps=1,
        ),
        train_dataset=word_pairs(4),
        processing_class=tiny_tokenizer(),
        peft_config=peft or {"r": 2, "target_modules": ["q_proj"]},
    )
    trainer.train()
    trainer.save_model()
    return sample_log_probs(trainer.model)


@pytest.mark.parametrize("as_object", [False, True])
@pytest.mark.parametrize("name", ["models/sft", "./models/sft", "../project/models/sft"])
def test_a_run_is_loaded_from_anywhere(name, as_object, project, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(name) if as_object else name
    expected = train(project, model)
    saved = json.loads((project / "run" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(project / "models" / "sft")
    run = json.loads((project / "run" / "run.json").read_text())
    assert run["model"] == run["reference"]["name"] == str(project / "models" / "sft")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    torch.testing.assert_close(sample_log_probs(load_model("../project/run")), expected)
    assert load_config("../project/run").model_type == "llama"
    # Moved with all it needs.
    shutil.move(project, tmp_path / "moved")
    torch.testing.assert_close(sample_log_probs(load_model(tmp_path / "moved" / "run")), expected)


def test_the_configuration_is_read_from_where_the_model_is(project):
    tiny_model("qwen3").save_pretrained("models")
    assert load_config("models").model_type == "qwen3"
    assert load_config("models", {"subfolder": "sft", "dtype": "bfloat16"}).model_type == "llama"


def test_a_run_that_holds_its_base_can_be_moved(project, tmp_path):
    train(project, "models/sft", "first")
    expected = train(project, "first", "second")
    shutil.move(project / "second", tmp_path / "second")
    torch.testing.assert_close(sample_log_probs(load_model(tmp_path / "second")), expected)


@pytest.mark.parametrize("name", ["models/sft", "./models/sft", "models/../models/sft"])
@pytest.mark.parametrize("where", ["run", "runs/dpo", "runs/dpo/checkpoint-5"])
def test_a_relative_base_is_looked_for_above_the_adapter(
    name, where, project, tmp_path, monkeypatch
):
    write_adapter(project / where, project / "models" / "sft", name)
    monkeypatch.chdir(tmp_path)
    assert chain_of(project / where)[0] == str(project / "models" / "sft")
    # Nearer than another project's model of the same name in the working directory.
    write_base(tmp_path / "models" / "sft")
    assert chain_of(project / where)[0] == str(project / "models" / "sft")


def test_the_working_directory_is_looked_in_last(project, tmp_path):
    write_adapter(tmp_path / "far" / "run", project / "models" / "sft", "models/sft")
    assert chain_of(tmp_path / "far" / "run")[0] == str(project / "models" / "sft")


@pytest.mark.parametrize(
    "name",
    [
        "models/sft",
        "./sft",
        "../base",
        "checkpoints/llama",
        "sft/checkpoint-500",
        "a/b/c",
        "/nowhere/project/models/sft",
        "C:\\models\\sft",
    ],
)
def test_a_folder_that_is_gone_is_named_and_not_asked_of_the_hub(name, project, tmp_path):
    write_adapter(tmp_path / "far" / "run", project / "models" / "sft", name)
    (project / "models").rename(project / "other")
    with pytest.raises(TokenRatioError) as caught:
        load_model(tmp_path / "far" / "run")
    message = str(caught.value)
    assert name in message
    assert "was not found" in message
    assert str(tmp_path / "far" / "run") in message
    assert "\n" not in message


def test_where_a_missing_base_was_is_said(project, tmp_path, monkeypatch):
    """As runs of older versions have it: the base relative, the run's folder too."""
    write_adapter(project / "runs" / "dpo", project / "models" / "sft", "models/sft")
    record = {"config": {"output_dir": "runs/dpo"}, "model": "models/sft"}
    (project / "runs" / "dpo" / "run.json").write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    assert chain_of("project/runs/dpo")[0] == str(project / "models" / "sft")
    shutil.rmtree(project / "models")
    with pytest.raises(TokenRatioError, match=rf"models/sft, .* it was in {project}"):
        load_model("project/runs/dpo")


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B", "gpt2", "meta-llama/Llama-3.2-1B"])
def test_a_hub_name_stays_one(name, project, tmp_path, monkeypatch):
    write_adapter(tmp_path / "run", project / "models" / "sft", name)
    asked = []
    monkeypatch.setattr(
        "tokenratio.models.provenance.find_adapter_config_file",
        lambda model, **_: (
            str(tmp_path / "run" / "adapter_config.json")
            if model == str(tmp_path / "run")
            else asked.append(model)
        ),
    )
    assert chain_of(tmp_path / "run")[0] == name
    assert asked == [name]


def test_a_hub_adapter_brings_its_base_and_revision(project, tmp_path, monkeypatch):
    write_adapter(tmp_path / "cache", project / "models" / "sft", "org/base")
    path = tmp_path / "cache" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"revision": "v2"}))
    monkeypatch.setattr(
        "tokenratio.models.provenance.find_adapter_config_file",
        lambda model, **_: str(path) if model == "org/adapter" else None,
    )
    where = {"token": "t", "revision": "main", "subfolder": "a", "dtype": "float32"}
    base, base_where, (adapter,) = chain_of("org/adapter", where)
    assert (base, dict(base_where)) == ("org/base", {"token": "t", "revision": "v2"})
    assert adapter.where == {"token": "t", "revision": "main", "subfolder": "a"}


@pytest.mark.parametrize("name", ["./nothing", "a/b/nothing", "~/nothing/at/all"])
def test_a_path_that_the_user_gives_is_a_folder_or_nothing(name, project):
    for load in (load_model, load_tokenizer):
        with pytest.raises(TokenRatioError, match="there is no such folder"):
            load(name)


def test_what_is_wrong_with_an_adapters_folder_is_said(project, tmp_path):
    adapter = tmp_path / "adapter"
    write_adapter(adapter, project / "models" / "sft", str(adapter))
    with pytest.raises(TokenRatioError, match="names itself as its base"):
        load_model(adapter)
    path = adapter / "adapter_config.json"
    for base in (None, ""):
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base})
        )
        with pytest.raises(TokenRatioError, match="does not name its base model"):
            load_model(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(TokenRatioError, match=r"no adapter_model\.safetensors"):
        load_model(adapter)
    path.write_text("{")
    with pytest.raises(TokenRatioError, match=r"adapter_config\.json: not JSON"):
        load_model(adapter)


def test_an_adapter_without_a_tokenizer_has_its_bases(project, tmp_path):
    write_adapter(tmp_path / "adapter", project / "models" / "sft", str(project / "models/sft"))
    assert load_tokenizer(tmp_path / "adapter").get_vocab() == tiny_tokenizer().get_vocab()
