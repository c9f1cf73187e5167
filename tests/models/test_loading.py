"""What a user says of how a model is loaded reaches `from_pretrained`, under any of its names."""

import pytest
import torch

from tiny import tiny_model, tiny_tokenizer
from tokenratio import TokenRatioConfig
from tokenratio.errors import TokenRatioError
from tokenratio.models.loading import load_model
from tokenratio.models.pretrained_arguments import loading_arguments, read_init_kwargs
from tokenratio.models.reward_model import load_reward_model
from tokenratio.training.reward_trainer import RewardConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        (None, torch.float32),
        ({}, torch.float32),
        ({"dtype": None}, torch.float32),
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": torch.bfloat16}, torch.bfloat16),
        ({"torch_dtype": "torch.float16"}, torch.float16),
        ({"dtype": "bf16"}, torch.bfloat16),
        ({"dtype": torch.float16}, torch.float16),
        ({"dtype": "bfloat16", "torch_dtype": torch.bfloat16}, torch.bfloat16),
        ({"dtype": "auto"}, torch.float32),  # the dtype of the file
        ({"dtype": None, "torch_dtype": "float64"}, torch.float64),
    ],
    ids=str,
)
def test_every_way_to_ask_for_a_dtype_counts(given, dtype, folder):
    assert load_model(folder, given).dtype == dtype
    assert load_reward_model(folder, seed=0, init_kwargs=given).dtype == dtype


def test_other_arguments_are_kept():
    given = {"torch_dtype": "bfloat16", "attn_implementation": "eager"}
    safe = {"trust_remote_code": False, "weights_only": True}
    kept = {"dtype": "bfloat16", "attn_implementation": "eager"}
    assert loading_arguments(given) == {**kept, **safe}
    assert loading_arguments({"revision": "v1"}) == {"dtype": "float32", "revision": "v1", **safe}
    assert read_init_kwargs(None) is None


@pytest.mark.parametrize("config", [TokenRatioConfig, RewardConfig])
def test_the_run_records_one_name(config, tmp_path):
    for given in ({"torch_dtype": "bf16"}, '{"torch_dtype": "bfloat16"}'):
        args = config(output_dir=str(tmp_path), model_init_kwargs=given)
        assert args.model_init_kwargs == {"dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "dtype float32 and torch_dtype bfloat16"),
        ({"torch_dtype": "bfloat61"}, "torch_dtype in model_init_kwargs must be float32, bfloat16"),
        ({"dtype": "int8"}, "dtype in model_init_kwargs must be"),
        ({"dtype": "nn"}, "dtype in model_init_kwargs must be"),
        ({"output_loading_info": True}, "cannot have output_loading_info"),
        ({"gguf_file": "x.gguf"}, "name the file itself as the model, such as path/to/x.gguf"),
        ("bfloat16", "must hold `name: value` lines"),
    ],
)
@pytest.mark.parametrize("config", [TokenRatioConfig, RewardConfig])
def test_what_cannot_be_meant_is_refused(given, message, config, folder, tmp_path):
    with pytest.raises(TokenRatioError, match=message):
        config(output_dir=str(tmp_path), model_init_kwargs=given)
    with pytest.raises(TokenRatioError, match=message):
        load_model(folder, given)
