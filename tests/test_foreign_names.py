"""Names from other libraries: each is ours, has advice, or is not mistaken for another of ours."""

import dataclasses
import re

import pytest
from peft import LoraConfig
from transformers import TrainingArguments
from trl import DPOConfig, ModelConfig, ScriptArguments

from tokenratio import TokenRatioConfig, TokenRatioTrainer, foreign_names
from tokenratio.cli.command import read_flags
from tokenratio.cli.recipe import recipe_fields
from tokenratio.errors import TokenRatioError
from tokenratio.foreign_names import advice, loss_name
from tokenratio.losses import METHODS
from tokenratio.settings import check_known
from tokenratio.training.reward_trainer import RewardConfig, RewardTrainer

KNOWN = recipe_fields()
INHERITED = {field.name for field in dataclasses.fields(TrainingArguments)}
# TRL's fields that mean here what they mean there.
SAME = {"beta", "label_smoothing", "max_length", "model_init_kwargs"}
COMING = {"dataset_num_proc"}
# As in the examples of the two projects.
AXOLOTL = """
base_model tokenizer_type model_type load_in_8bit load_in_4bit strict chat_template rl datasets
dataset_prepared_path val_set_size adapter lora_model_dir sequence_len sample_packing
eval_sample_packing pad_to_sequence_len lora_r lora_alpha lora_dropout lora_target_linear
lora_target_modules lora_modules_to_save lora_fan_in_fan_out wandb_project wandb_entity
wandb_watch wandb_name wandb_log_model micro_batch_size num_epochs optimizer lr_scheduler
cosine_min_lr_ratio rl_beta dpo_beta train_on_inputs group_by_length flash_attention
xformers_attention warmup_ratio early_stopping_patience evals_per_epoch saves_per_epoch
special_tokens trust_remote_code save_safetensors dataset_processes rpo_alpha
"""
LLAMA_FACTORY = """
model_name_or_path stage finetuning_type lora_rank lora_target pref_beta pref_loss pref_ftx
dataset dataset_dir template cutoff_len preprocessing_num_workers overwrite_cache plot_loss
overwrite_output_dir val_size quantization_bit quantization_method flash_attn additional_target
adapter_name_or_path tokenized_path streaming mask_history train_on_prompt packing neat_packing
ref_model_adapters use_unsloth pissa_init loraplus_lr_ratio infer_dtype
"""
HANDBOOK = """
torch_dtype use_flash_attention_2 dataset_mixer dataset_splits truncation_mode
max_completion_length max_prompt_length evaluation_strategy use_peft lora_r loss_type
generate_during_eval precompute_ref_log_probs ref_model_name_or_path
"""
# As in the documentation of the two projects' commands for preference training.
MS_SWIFT = """
rlhf_type train_type tuner_type model_id_or_path adapters ref_adapters split_dataset_ratio max_len
torch_dtype target_modules quant_method quant_bits bnb_4bit_compute_dtype system template_type
custom_dataset_path dataset_num_proc rpo_alpha lora_rank columns ref_model attn_impl
"""
OPENRLHF = """
pretrain ref_pretrain save_path micro_train_batch_size train_batch_size max_len max_epochs
zero_stage l2 adam_betas lr_warmup_ratio nll_loss_coef prompt_key chosen_key rejected_key
apply_chat_template input_template use_wandb wandb_org wandb_group load_checkpoint
"""


def message(name, value=None, known=KNOWN, what="flag"):
    with pytest.raises(TokenRatioError) as caught:
        check_known({name: value}, known, what)
    text = str(caught.value)
    assert len(text) < 250
    return text


@pytest.mark.parametrize("cls", [DPOConfig, ScriptArguments, ModelConfig])
def test_trls_fields_are_ours_or_have_advice(cls):
    for name in {field.name for field in dataclasses.fields(cls)} - INHERITED:
        if name in KNOWN:
            assert name in SAME | {"lora_alpha", "dataset_num_proc"}, name
        else:
            assert "did you mean" not in message(name)
            assert advice(name, KNOWN) or name in COMING, name


@pytest.mark.parametrize("names", [AXOLOTL, LLAMA_FACTORY, HANDBOOK, MS_SWIFT, OPENRLHF])
def test_other_projects_names_have_advice(names):
    for name in set(names.split()) - set(KNOWN):
        assert "did you mean" not in message(name)
        assert advice(name, {*KNOWN, *COMING}), name


def test_advice_names_only_what_there_is():
    """Every name of the table leads to a field of ours, or of the section that is meant."""
    sections = {
        "peft": {field.name for field in dataclasses.fields(LoraConfig)},
        "model_init_kwargs": {*("dtype", "attn_implementation", "revision", "rope_scaling")},
        "lr_scheduler_kwargs": {"min_lr_rate"},
        "chat_template_kwargs": {"enable_thinking"},
    }
    for ours, names in foreign_names._TABLE.items():
        assert not set(names.split()) & set(KNOWN) - {"bf16"}, ours
        if foreign_names._NAME.fullmatch(ours):
            section, _, inner = ours.partition(".")
            assert section in {*KNOWN, *COMING}, ours
            assert not inner or inner in sections[section], ours
    for ours in foreign_names._TABLE_OF_PEFT:
        assert ours in sections["peft"]
    for ours in foreign_names._TABLE_OF_LOSSES:
        assert not ours or ours in METHODS


def test_no_name_is_listed_twice():
    for table in ("_TABLE", "_TABLE_OF_PEFT", "_TABLE_OF_LOSSES"):
        names = " ".join(getattr(foreign_names, table).values()).split()
        assert len(names) == len(set(names)), {name for name in names if names.count(name) > 1}


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("loss_type", "sigmoid", "use loss: dpo"),
        ("loss_type", "robust", "use loss: robust_dpo"),
        ("pref_loss", "simpo", "use loss"),
        ("loss_type", "hinge", "the loss hinge is not available"),
        ("rl", "kto", "the loss kto is not available"),
        ("lora_r", "16", "use peft: {r: ...}"),
        ("use_peft", "true", "use peft, for example peft: {r: 16, target_modules: all-linear}"),
        ("load_in_4bit", "true", "quantized training is not supported"),
        ("pref_beta", "0.1", "use beta"),
        ("precompute_ref_log_probs", "true", "use cache_reference"),
        ("model_name_or_path", "m", "use model"),
        ("ref_model_name_or_path", "m", "use ref_model"),
        ("torch_dtype", "bfloat16", "use model_init_kwargs: {dtype: ...}"),
        ("dataset_name", "d", "use train_dataset"),
        ("truncation_mode", "keep_end", "max_prompt_length cuts prompts on the left"),
        ("rpo_alpha", "1", "use sft_weight"),
    ],
)
def test_the_commonest(name, value, expected):
    assert message(name, value) == f"unknown flag {name!r}: {expected}" or expected in message(
        name, value
    )
    with pytest.raises(TokenRatioError, match=re.escape(expected)):
        read_flags([f"--{name}", value], KNOWN)
    with pytest.raises(TokenRatioError, match=re.escape(expected)):
        read_flags([f"--{name}={value}"], KNOWN)


def test_advice_is_about_the_place_it_is_given_in():
    lora = [field.name for field in dataclasses.fields(LoraConfig)]
    assert message("lora_r", 8, lora) == "unknown flag 'lora_r': use r"
    assert message("lora_target", "all", lora) == "unknown flag 'lora_target': use target_modules"
    # A command that trains nothing has no loss, and `model` is another thing there.
    assert message("loss_type", "dpo", ["model", "temperature"]) == (
        "unknown flag 'loss_type'; known: model, temperature"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("beta1", "use adam_beta1"),
        ("log_every", "use logging_steps"),
        ("pure_bf16", "use bf16"),
        ("sft_model", "use model"),
        ("reference", "use ref_model"),
        ("target_modules", "use peft: {target_modules: ...}"),
        ("train_samples", "use max_samples"),
        ("warmup_ratio", "use warmup_steps: below 1 it is a share of all steps"),
        ("dataset_splits", "name it with the source, as NAME:CONFIG@SPLIT; see docs/data.md"),
        ("qlora", "quantized training is not supported"),
        ("learning-rate", "; did you mean 'learning_rate'?"),
        ("Beta", "; did you mean 'beta'?"),
    ],
)
def test_the_nearest_spelling_is_not_taken_for_the_meaning(name, expected):
    assert expected in message(name)


def test_near_names_only_when_near():
    assert message("lerning_rate").endswith("; did you mean 'learning_rate'?")
    assert message("wibble").endswith("; --help lists them")
    assert message("wibble", known=["a", "b"]).endswith("; known: a, b")


@pytest.mark.parametrize(
    ("cls", "arguments", "expected"),
    [
        (TokenRatioConfig, {"loss_type": "sigmoid"}, "no argument 'loss_type': use loss='dpo'"),
        (TokenRatioConfig, {"loss_type": ["sigmoid"]}, "use loss"),
        (TokenRatioConfig, {"lora_r": 8}, "use peft_config=LoraConfig(...), an argument of the"),
        (TokenRatioConfig, {"model_name_or_path": "m"}, "use model, an argument of the trainer"),
        (TokenRatioConfig, {"tokenizer_name": "m"}, "use processing_class, an argument of the"),
        (TokenRatioConfig, {"torch_dtype": "auto"}, "use model_init_kwargs={'dtype': ...}"),
        (TokenRatioConfig, {"lerning_rate": 1}, "did you mean 'learning_rate'?"),
        (TokenRatioConfig, {"loss": "sigmoid"}, "unknown loss 'sigmoid': it is called dpo here"),
        (TokenRatioConfig, {"loss": "dp"}, "unknown loss 'dp'; did you mean 'dpo'?"),
        (TokenRatioConfig, {"loss": "dpo-pairs"}, "unknown loss 'dpo-pairs': it is called dpo"),
        (TokenRatioConfig, {"loss": "cdpo"}, "unknown loss 'cdpo': use loss: dpo with label_smoo"),
        (TokenRatioConfig, {"loss": "rdpo"}, "unknown loss 'rdpo': it is called robust_dpo here"),
        (TokenRatioConfig, {"loss": "TBPO-A"}, "unknown loss 'TBPO-A'; did you mean 'tbpo_a'?"),
        (TokenRatioConfig, {"loss": "APO"}, "the loss APO is not available"),
        (TokenRatioConfig, {"loss": None}, "unknown loss null; `tokenratio methods` lists them"),
        (TokenRatioConfig, {"lr_scheduler_type": "cosine_annealing"}, "did you mean 'cosine'"),
        (TokenRatioConfig, {"loss": "orpo"}, "the loss orpo is not available"),
        (TokenRatioConfig, {"optim": "rmsprp"}, "unknown optim 'rmsprp'; did you mean 'rmsprop'"),
        (TokenRatioConfig, {"optim": "adam"}, "did you mean 'adamw_torch'"),
        (TokenRatioConfig, {"save_strategy": "epochs"}, "no, steps, epoch, best, not 'epochs'; d"),
        (TokenRatioConfig, {"lr_scheduler_type": "cosin"}, "did you mean 'cosine'?"),
        (TokenRatioConfig, {"train_dataset": 1}, "use train_dataset, an argument of the trainer"),
        (TokenRatioConfig, {"peft": {}}, "use peft_config=LoraConfig(...), an argument of the tra"),
        (TokenRatioConfig, {"sft": {}}, "no argument 'sft': it is available only in recipes"),
        (TokenRatioConfig, {"max_length": "5"}, "max_length must be a number, not '5'"),
        (TokenRatioConfig, {"held_out_share": "5 %"}, "held_out_share must be a number, not '5 %"),
        (TokenRatioConfig, {"columns": "ask"}, "columns must be a mapping such as {prompt: ask"),
        (TokenRatioConfig, {"chat_template_kwargs": "x"}, "must be a mapping such as {enable_th"),
        (TokenRatioConfig, {"tools": [1]}, "each of tools must be a mapping such as {type: func"),
        (
            TokenRatioConfig,
            {"model_init_kwargs": {"load_in_4bit": True}},
            "load_in_4bit in model_init_kwargs: quantized training is not supported",
        ),
        (TokenRatioConfig, {"logging_steps": 0}, "logging strategy steps requires non-zero"),
        (RewardConfig, {"lora_r": 1}, "no argument 'lora_r': it is not supported here"),
        (RewardConfig, {"pref_beta": 1}, "RewardConfig has no argument 'pref_beta'"),
        (RewardConfig, {"num_epochs": 1}, "use num_train_epochs"),
        (TokenRatioTrainer, {"tokenizer": None}, "no argument 'tokenizer': use processing_class"),
        (TokenRatioTrainer, {"beta": 0.1}, "use args=TokenRatioConfig(beta=...)"),
        (TokenRatioTrainer, {"rpo_alpha": 1}, "use args=TokenRatioConfig(sft_weight=...)"),
        (TokenRatioTrainer, {"max_len": 1}, "use args=TokenRatioConfig(max_length=...)"),
        (TokenRatioTrainer, {"dataset": []}, "use train_dataset"),
        (TokenRatioTrainer, {"data_collator": None}, "no argument 'data_collator': it has its own"),
        (TokenRatioTrainer, {"peft_confg": None}, "did you mean 'peft_config'?"),
        (RewardTrainer, {"tokenizer": None}, "RewardTrainer has no argument 'tokenizer': use proc"),
    ],
)
def test_python_says_the_same(cls, arguments, expected):
    with pytest.raises(TokenRatioError, match=re.escape(expected)):
        cls(**arguments)


def test_constructors_keep_their_signatures():
    import inspect

    fields = [field.name for field in dataclasses.fields(TokenRatioConfig) if field.init]
    assert list(inspect.signature(TokenRatioConfig).parameters) == fields
    assert "processing_class" in inspect.signature(TokenRatioTrainer).parameters


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "ipo", "simpo", "sft"])
def test_trls_losses_that_exist_here(loss):
    assert (loss_name(loss) or loss) in METHODS
