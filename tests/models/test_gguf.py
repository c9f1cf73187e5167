"""A GGUF file is a model name like any other: the same numbers, and ordinary folders from it."""

import json
import logging
import struct

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gguf_files import TEXTS, byte_model, byte_tokenizer, write_gguf
from tiny import word_pairs
from tokenratio import TokenRatioConfig, TokenRatioTrainer
from tokenratio.errors import TokenRatioError
from tokenratio.models import gguf as gguf_models
from tokenratio.models.gguf import load_gguf, load_gguf_tokenizer
from tokenratio.models.loading import (
    load_config,
    load_generation_ends,
    load_model,
    load_tokenizer,
)
from tokenratio.models.provenance import origin_of
from tokenratio.models.reward_model import load_reward_model


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A model, its tokenizer, the file of each quantisation, and what its tensors then hold."""
    folder, tokenizer = tmp_path_factory.mktemp("gguf"), byte_tokenizer()
    model = byte_model(tokenizer)
    files, tensors = {}, {}
    for kind in ("F32", "Q8_0", "Q4_1"):
        files[kind] = folder / f"tiny-{kind}.gguf"
        tensors[kind] = write_gguf(files[kind], model, tokenizer, kind)
    # What lies beside a file is not read.
    (folder / "tokenizer_config.json").write_text('{"eos_token": "wrong", "chat_template": "x"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    (folder / "adapter_config.json").write_text("{}")
    return model, tokenizer, files, tensors


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits


def test_a_float32_file_computes_what_the_model_does(written):
    model, tokenizer, files, _ = written
    ids = tokenizer(TEXTS[0])["input_ids"]
    assert torch.equal(logits(load_model(files["F32"]), ids), logits(model.eval(), ids))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_a_quantised_file_holds_what_llama_cpp_dequantises(kind, written):
    model, _, files, tensors = written
    loaded = load_model(files[kind])
    weights = loaded.state_dict()
    assert loaded.dtype == torch.float32
    assert np.array_equal(weights["model.embed_tokens.weight"], tensors[kind]["token_embd.weight"])
    assert np.array_equal(
        weights["model.layers.1.mlp.down_proj.weight"], tensors[kind]["blk.1.ffn_down.weight"]
    )
    # Queries lie in llama.cpp's order of rotary pairs: back in order they are the model's, rounded.
    own = model.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    rounding = (weights["model.layers.0.self_attn.q_proj.weight"] - own).abs().max()
    step = own.abs().max() * (2 / 255 if kind == "Q8_0" else 2 / 15)
    assert 0 < rounding <= step


def test_the_dtype_is_the_one_asked_for(written):
    loaded = load_model(written[2]["Q4_1"], {"dtype": "bfloat16"})
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert load_model(written[2]["Q4_1"], {"dtype": "auto"}).dtype == torch.float32


def test_tokenizer_template_and_ends_come_from_the_file_alone(written):
    _, tokenizer, files, _ = written
    found = load_tokenizer(files["Q4_1"])
    for text in [*TEXTS, "Ünïcode 12345  7\n\n x", "user: hi<|eos|>\n"]:
        assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert found.decode(found(text, add_special_tokens=False)["input_ids"]) == text
    assert len(found) == load_model(files["Q4_1"]).config.vocab_size  # none that the file lacks
    assert found.chat_template == tokenizer.chat_template
    assert found.eos_token == tokenizer.eos_token == "<|eos|>"
    assert load_generation_ends(files["Q4_1"]) == [tokenizer.eos_token_id]
    assert load_model(files["Q4_1"]).generation_config.eos_token_id == [tokenizer.eos_token_id]


def test_a_model_whose_turns_end_with_another_token_than_eos_stops_there(written, tmp_path):
    model, tokenizer, *_ = written
    path = tmp_path / "two-ends.gguf"
    write_gguf(path, model, tokenizer, more={"tokenizer.ggml.eot_token_id": 9})
    assert load_gguf(path, {}).generation_config.eos_token_id == sorted([tokenizer.eos_token_id, 9])


def test_numbers_are_split_as_in_training(written, tmp_path, caplog):
    model, tokenizer, *_ = written
    for pre in ("smollm", "nobody-knows"):
        write_gguf(tmp_path / f"{pre}.gguf", model, tokenizer, pre=pre)
    digits = load_gguf_tokenizer(tmp_path / "smollm.gguf")
    # Between digits nothing is merged, and a space before one stands alone.
    assert "345" in TEXTS[2]
    parts = digits.backend_tokenizer.pre_tokenizer.pre_tokenize_str("or  345")
    assert [part for part, _ in parts] == ["or", "ĠĠ", "3", "4", "5"]
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        load_gguf_tokenizer(tmp_path / "nobody-knows.gguf")
    assert "'nobody-knows' is not known" in caplog.text


def test_what_is_saved_is_an_ordinary_folder(written, tmp_path):
    _, tokenizer, files, _ = written
    loaded = load_model(files["Q4_1"])
    loaded.save_pretrained(tmp_path)
    load_tokenizer(files["Q4_1"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not [key for key in config if "quant" in key or key == "_model_name_or_path"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path)(TEXTS[1])["input_ids"]
    assert ids == tokenizer(TEXTS[1])["input_ids"]
    assert torch.equal(logits(again, ids), logits(loaded, ids))


def test_the_origin_is_the_path_with_its_quantisation(written):
    path = written[2]["Q4_1"]
    origin = origin_of(load_model(path))
    assert origin.name == str(path)
    assert str(origin) == f"{path} (Q4_1)"
    assert load_config(path).name_or_path == str(path)


def test_a_reward_model_starts_from_a_file(written):
    path = written[2]["Q8_0"]
    body, policy = load_reward_model(path, seed=0), load_model(path)
    assert body.config.num_labels == 1
    assert torch.equal(
        body.state_dict()["model.layers.0.mlp.up_proj.weight"],
        policy.state_dict()["model.layers.0.mlp.up_proj.weight"],
    )


def trained(path, output, peft_config=None, **settings):
    args = TokenRatioConfig(
        output_dir=str(output), max_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        per_device_train_batch_size=4, disable_tqdm=True, save_strategy="no", **settings,
    )  # fmt: skip
    trainer = TokenRatioTrainer(
        str(path), args=args, train_dataset=word_pairs(8), peft_config=peft_config
    )
    trainer.train()
    trainer.save_model()
    return trainer


def test_an_adapter_trained_on_a_file_is_loaded_by_plain_peft(written, tmp_path):
    path = written[2]["Q4_1"]
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = trained(path, tmp_path / "run", lora)
    ids = load_tokenizer(path)(TEXTS[0])["input_ids"]
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")
    assert torch.equal(logits(plain, ids), logits(trainer.model.eval(), ids))
    assert torch.equal(logits(plain.unload(), ids), logits(load_model(path), ids))
    assert not torch.equal(logits(trainer.model, ids), logits(load_model(path), ids))
    reference = json.loads((tmp_path / "run" / "run.json").read_text())["reference"]
    assert reference["name"] == str(tmp_path / "run" / "base")
    assert reference["base"] == f"{path} (Q4_1)"


def test_full_training_on_a_file_saves_an_ordinary_folder(written, tmp_path):
    path = written[2]["Q4_1"]
    trainer = trained(path, tmp_path / "run", loss="dpo")
    ids = load_tokenizer(path)(TEXTS[0])["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert torch.equal(logits(plain, ids), logits(trainer.model.eval(), ids))
    reference = json.loads((tmp_path / "run" / "run.json").read_text())["reference"]
    assert (reference["name"], reference["base"]) == (str(path), f"{path} (Q4_1)")
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"frozen copy of the starting policy ({path.name} (Q4_1))" in card
    assert str(path.parent) not in card


def test_an_adapter_of_another_tool_may_name_a_file(written, tmp_path):
    files = written[2]
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(load_model(files["F32"]), config)
    with pytest.warns(UserWarning, match="Could not find a config file"):
        adapted.save_pretrained(tmp_path)
    named = json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(files["F32"])
    assert torch.equal(logits(load_model(tmp_path), [5, 6]), logits(adapted.eval(), [5, 6]))


# --- what is no model ---------------------------------------------------------------------------


def test_a_missing_package_is_named(written, monkeypatch):
    monkeypatch.setattr(gguf_models, "find_spec", lambda name: None)
    with pytest.raises(TokenRatioError, match=r"needs the package gguf: pip install 'tokenratio"):
        load_model(written[2]["F32"])


def test_a_file_is_not_quantised_again(written):
    path = written[2]["Q8_0"]
    with pytest.raises(TokenRatioError, match="quantization_config does not apply to a GGUF file"):
        load_model(path, {"quantization_config": {"load_in_4bit": True}})
    assert load_model(path, {"quantization_config": None}).dtype == torch.float32


def test_a_missing_file_is_not_asked_of_the_hub(tmp_path):
    for name in (tmp_path / "none.gguf", "none.gguf", "models/none.gguf"):
        for load in (load_model, load_tokenizer, load_config, load_reward_model):
            with pytest.raises(TokenRatioError, match=r"cannot load .*none.gguf: there is no such"):
                load(name, **({"seed": 0} if load is load_reward_model else {}))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.97])
def test_a_file_that_is_cut_off_is_one_line(share, written, tmp_path):
    content = written[2]["Q4_1"].read_bytes()
    broken = tmp_path / "cut.gguf"
    broken.write_bytes(content[: int(share * len(content))])
    for load in (load_model, load_tokenizer, load_config):
        with pytest.raises(
            TokenRatioError, match=r"cut.gguf is (cut off|not a GGUF file, or)"
        ) as e:
            load(broken)
        assert "\n" not in str(e.value)


def test_anything_else_with_this_ending_is_one_line(tmp_path):
    (tmp_path / "x.gguf").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(TokenRatioError, match="does not start with the GGUF magic bytes"):
        load_model(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"general.architecture": "clip"}, "architecture clip is not supported"),
        ({"general.architecture": "t5"}, "holds a model of kind t5, not a causal language model"),
        ({"general.type": "adapter"}, r"holds only a part of a model \(adapter\)"),
        ({"general.type": "mmproj"}, r"holds only a part of a model \(mmproj\)"),
        ({"split.count": 3}, "is one of 3 parts of a model"),
    ],
    ids=["unknown", "encoder", "adapter", "vision", "split"],
)
def test_another_kind_of_file_is_named(more, message, written, tmp_path):
    model, tokenizer, *_ = written
    write_gguf(tmp_path / "x.gguf", model, tokenizer, more=more)
    with pytest.raises(TokenRatioError, match=message):
        load_model(tmp_path / "x.gguf")


def test_tensors_that_would_be_lost_or_made_up_are_refused(written, tmp_path):
    model, tokenizer, *_ = written
    scaled = {"rope_freqs.weight": np.ones(8, dtype=np.float32)}
    write_gguf(tmp_path / "rope.gguf", model, tokenizer, extra_tensors=scaled)
    with pytest.raises(TokenRatioError, match=r"scales its rotary embedding \(rope_freqs.weight\)"):
        load_model(tmp_path / "rope.gguf")
    write_gguf(tmp_path / "few.gguf", model, tokenizer, leave_out="blk.1.ffn_up.weight")
    with pytest.raises(TokenRatioError, match=r"has no weights for model.layers.1.mlp.up_proj"):
        load_model(tmp_path / "few.gguf")


def test_a_quantisation_that_cannot_be_read_is_named(written, tmp_path):
    content = written[2]["Q8_0"].read_bytes()
    name = b"blk.0.ffn_up.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    assert struct.unpack_from("<I", content, at) == (8,)
    for type_id, message in ((9, "Dequantization for Q8_1"), (77, r"with gguf 0.*77\)? is not")):
        path = tmp_path / f"type-{type_id}.gguf"
        path.write_bytes(content[:at] + struct.pack("<I", type_id) + content[at + 4 :])
        with pytest.raises(TokenRatioError, match=message) as error:
            load_model(path)
        assert "\n" not in str(error.value)


def test_a_file_without_a_tokenizer_says_so(written, tmp_path):
    write_gguf(tmp_path / "x.gguf", written[0], None)
    with pytest.raises(TokenRatioError, match="has no tokenizer in it: name another"):
        load_tokenizer(tmp_path / "x.gguf")
    assert torch.equal(
        logits(load_model(tmp_path / "x.gguf"), [5]), logits(load_model(written[2]["F32"]), [5])
    )
