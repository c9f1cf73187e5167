"""Names of settings in other libraries: our name, or why there is none.

The libraries are TRL (`DPOConfig`, `ScriptArguments`, `ModelConfig`), the alignment handbook,
Axolotl, LLaMA-Factory, ms-swift and OpenRLHF. Names with the same meaning here are not listed.
"""

import re
from collections.abc import Collection
from typing import Any

# Our name, dotted inside a section, or advice: the names in other libraries.
_TABLE = {
    # The model.
    "model": "model_name_or_path base_model model_name model_id model_id_or_path model_path "
    "pretrain sft_model sft_model_path adapter_name_or_path adapters lora_model_dir lora_path",
    "ref_model": "ref_model_name_or_path ref_model_path ref_model_adapters ref_adapters "
    "ref_pretrain reference reference_model",
    "tokenizer": "tokenizer_name_or_path tokenizer_name tokenizer_path tokenizer_config "
    "processing_class",
    "model_init_kwargs.dtype": "torch_dtype dtype infer_dtype compute_dtype",
    "model_init_kwargs.attn_implementation": "attn_implementation attn_impl flash_attn "
    "flash_attention use_flash_attention_2 sdp_attention xformers_attention eager_attention",
    "model_init_kwargs.revision": "model_revision revision_of_model",
    "a model must contain only data; tokenratio never runs its code": "trust_remote_code",
    "model_init_kwargs.rope_scaling": "rope_scaling",
    "it is read from the model's configuration": "model_type tokenizer_type",
    "only causal language models are supported": "is_encoder_decoder",
    "accelerate places the model": "device_map low_cpu_mem_usage",
    "accelerate chooses the device; use_cpu: true keeps the run on the CPU": "device",
    "start one process for each GPU, with accelerate launch": "gpus n_gpu num_gpus devices "
    "world_size",
    "quantized training is not supported; train an adapter (peft) on a model loaded with "
    "model_init_kwargs: {dtype: bfloat16}": "load_in_4bit load_in_8bit quantization_bit "
    "quantization_method quantization_type double_quantization bnb_4bit_quant_type "
    "bnb_4bit_quant_storage bnb_4bit_compute_dtype bnb_4bit_use_double_quant bnb_config_kwargs "
    "use_bnb_nested_quant ref_model_quantization_bit llm_int8_threshold "
    "quantization_config quant_bits quant_method qlora use_qlora",
    "add it to the tokenizer, save that, and set tokenizer to its folder": "special_tokens "
    "tokens add_tokens add_special_tokens new_special_tokens eos_token pad_token resize_vocab",
    "chat_template": "template template_type chat_template_path chat_template_jinja chat_format "
    "prompt_template prompt_format input_template conversation_template",
    "conversations are always rendered with the chat template": "apply_chat_template",
    "chat_template_kwargs.enable_thinking": "enable_thinking",
    "put the system prompt into the rows, as the first message or in a column named system": ""
    "default_system system",
    # The adapter.
    "peft": "use_peft use_lora adapter finetuning_type peft_config lora_config lora train_type "
    "tuner_type sft_type",
    "peft.r": "lora_r lora_rank",
    "peft.lora_alpha": "lora_alpha",
    "peft.lora_dropout": "lora_dropout",
    "peft.target_modules": "target_modules lora_target lora_target_modules lora_target_linear",
    "peft.target_parameters": "lora_target_parameters",
    "peft.modules_to_save": "lora_modules_to_save additional_target",
    "peft.layers_to_transform": "peft_layers_to_transform",
    "peft.bias": "lora_bias",
    "peft.fan_in_fan_out": "lora_fan_in_fan_out",
    "peft.use_rslora": "use_rslora peft_use_rslora",
    "peft.use_dora": "use_dora peft_use_dora",
    "the task of an adapter is always CAUSAL_LM": "lora_task_type",
    # The method.
    "loss": "loss_type dpo_loss_type dpo_loss pref_loss loss_name loss_fn rl rlhf_type simpo_loss "
    "method algorithm",
    "beta": "pref_beta rl_beta dpo_beta simpo_beta kl_beta kl_coef ipo_tau tau",
    "label_smoothing": "dpo_label_smoothing pref_label_smoothing",
    "sft_weight": "rpo_alpha pref_ftx cpo_alpha dpo_ftx nll_loss_coef nll_loss_weight "
    "sft_loss_weight sft_alpha sft_coef",
    "simpo_gamma": "gamma",
    "cache_reference": "precompute_ref_log_probs precompute_ref_logps",
    "the reference runs in batches of per_device_eval_batch_size": "precompute_ref_batch_size",
    "simpo_gamma is this ratio times beta": "gamma_beta_ratio",
    "loss: simpo needs no reference": "reference_free",
    "loss chooses the method, and sft: {...} adds a first stage of SFT": "stage",
    "the reference does not change during training": "sync_ref_model ref_model_mixup_alpha "
    "ref_model_sync_steps",
    "dropout is off in policy and reference; an adapter's own is peft: {lora_dropout: ...}": ""
    "disable_dropout",
    "only the tokens of the responses are trained on": "train_on_inputs train_on_prompt "
    "mask_prompt mask_history completion_only_loss assistant_only_loss",
    # The data.
    "train_dataset": "dataset datasets dataset_name dataset_path dataset_dir dataset_mixer "
    "dataset_mixture dataset_id custom_dataset_path custom_train_dataset_path train_dataset_path "
    "data_path data_files train_path train_file train_files train_data",
    "eval_dataset": "val_file eval_file validation_file val_dataset test_datasets test_dataset "
    "eval_data eval_dataset_name custom_val_dataset_path val_dataset_path validation_dataset",
    "held_out_share": "val_size val_set_size test_size val_ratio split_dataset_ratio "
    "dataset_test_ratio validation_split_percentage",
    "train_split": "dataset_train_split dataset_split split",
    "eval_split": "dataset_test_split dataset_eval_split test_split val_split validation_split",
    "max_samples": "max_train_samples max_examples num_samples num_train_samples train_samples "
    "train_dataset_sample",
    "columns": "column_mapping columns_mapping dataset_text_field text_column prompt_column "
    "chosen_column rejected_column prompt_key chosen_key rejected_key input_key output_key "
    "field_messages message_property_mappings",
    "dataset_num_proc": "preprocessing_num_workers dataset_processes num_proc",
    "name it with the source, as NAME:CONFIG@SPLIT; see docs/data.md": "dataset_config "
    "dataset_configs dataset_config_name dataset_splits dataset_subset subset",
    "give each source in train_dataset a weight; see docs/data.md": "interleave_probs mix_strategy",
    "data is read whole, not streamed": "dataset_streaming streaming",
    "max_length": "cutoff_len sequence_len max_seq_length max_seq_len max_len max_model_len "
    "model_max_length",
    "max_prompt_length": "max_source_length max_prompt_len prompt_max_len max_query_length",
    "max_prompt_length cuts prompts on the left, max_length responses on the right": ""
    "truncation_mode",
    "max_length bounds prompt and response together, max_prompt_length the prompt": ""
    "max_completion_length max_target_length max_response_length max_new_tokens",
    "batches are padded as needed, and rows of similar length share a batch": "padding_free "
    "packing sample_packing neat_packing eval_packing eval_sample_packing packing_strategy "
    "pad_to_multiple_of pad_to_sequence_len label_pad_token_id padding_value pad_token_id "
    "ignore_pad_token_for_loss",
    "train_sampling_strategy": "group_by_length shuffle_dataset",
    "it is not needed here": "dataset_prepared_path tokenized_path overwrite_cache strict "
    "dataset_kwargs save_safetensors shuffle_merged_datasets",
    # The run.
    "output_dir": "output_path output_directory out_dir save_path save_dir checkpoint_dir",
    "resume_from_checkpoint": "resume resume_from resume_from_ckpt load_checkpoint "
    "auto_resume_from_checkpoints",
    "seed": "random_seed seed_everything",
    "per_device_train_batch_size": "micro_batch_size batch_size train_batch_size "
    "micro_train_batch_size per_device_batch_size per_gpu_train_batch_size",
    "per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation grad_accumulation grad_accum "
    "accumulation_steps accumulate_grad_batches",
    "activation_checkpointing": "gradient_checkpoint use_gradient_checkpointing grad_checkpointing",
    "num_train_epochs": "num_epochs epochs n_epochs train_epochs max_epochs",
    "max_steps": "num_steps",
    "optim": "optimizer optimizer_type optimizer_name",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "use adam_beta1 and adam_beta2": "adam_betas betas",
    "adam_epsilon": "adam_eps eps",
    "weight_decay": "l2 wd",
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_scheduler scheduler lr_schedule",
    "lr_scheduler_kwargs.min_lr_rate": "cosine_min_lr_ratio",
    "use warmup_steps: below 1 it is a share of all steps": "warmup_ratio lr_warmup_ratio "
    "warmup_proportion warmup",
    "warmup_steps": "lr_warmup_steps num_warmup_steps",
    "max_grad_norm": "clip_grad grad_clip gradient_clipping gradient_clip_val max_norm",
    "logging_steps": "log_every log_every_n_steps log_interval log_steps",
    "eval_strategy": "evaluation_strategy",
    "eval_steps": "eval_every eval_interval evaluation_steps",
    "save_steps": "save_every save_interval save_freq",
    "save_total_limit": "save_limit max_checkpoints max_ckpt_num",
    "metric_for_best_model": "metric metric_best",
    "dataloader_num_workers": "num_workers dataloader_workers",
    "overwrite": "overwrite_output_dir",
    "use eval_steps and save_steps: below 1 they are shares of all steps": "evals_per_epoch "
    "saves_per_epoch",
    "pass transformers.EarlyStoppingCallback to TokenRatioTrainer": "early_stopping_patience "
    "early_stopping",
    "use `tokenratio evaluate` after training": "generate_during_eval",
    "use_cpu": "no_cuda use_mps_device",
    "use bf16: true or fp16: true": "mixed_precision precision",
    "bf16": "bfloat16 pure_bf16",
    "fp16": "float16",
    "metrics.jsonl in the run's folder holds every logged value": "plot_loss",
    "report_to": "logger log_with use_wandb use_tensorboard wandb",
    "run_name": "wandb_name wandb_run_name experiment_name exp_name",
    "hub_token": "hf_token",
    "hub_model_id": "push_to_hub_model_id hub_repo_id",
    "report_to names the tracker; set the rest in its environment variables, such as "
    "WANDB_PROJECT": "wandb_project wandb_org wandb_group wandb_entity wandb_watch "
    "wandb_log_model wandb_run_id mlflow_tracking_uri mlflow_experiment_name "
    "comet_project_name logging_dir",
    "deepspeed": "deepspeed_config",
    "accelerate launch takes it, or the deepspeed setting": "zero_stage",
    "NEFTune is not supported: its noise makes policy and reference differ": "neftune_alpha "
    "noise_alpha",
    "it is not supported": "f_divergence_type f_alpha_divergence_coef discopop_tau loss_weights "
    "ld_alpha dpop_lambda orpo_alpha kto_beta use_weighting dpo_use_weighting dpo_norm_loss "
    "pref_bco_weight desirable_weight undesirable_weight kto_chosen_weight kto_rejected_weight "
    "router_aux_loss_coef moe_aux_loss_coef center_rewards_coefficient activation_offloading "
    "use_unsloth use_logits_to_keep ignore_bias_buffers force_use_ref_model ref_adapter_name "
    "model_adapter_name reward_model mixture_of_depths shift_attn pissa_init pissa_iter "
    "loraplus_lr_ratio loraplus_lr_embedding use_galore use_badam use_apollo create_new_adapter "
    "freeze_trainable_layers freeze_trainable_modules unfrozen_parameters",
}
# Further names inside the section peft.
_TABLE_OF_PEFT = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "peft_type": "type adapter finetuning_type",
}
# Our names for the values of `loss_type`, `pref_loss` and `rl`; under "" those without a method.
_TABLE_OF_LOSSES = {
    "dpo": "sigmoid dpo_pair dpo_pairs",
    "robust_dpo": "robust rdpo",
    "sft": "nll cross_entropy",
    "": "hinge exo exo_pair nca nca_pair bco_pair bco sppo_hard sppo aot aot_pair aot_unpaired apo "
    "apo_zero apo_down discopop sigmoid_norm kto kto_pair orpo cpo cpo_simpo grpo ppo",
}
# Settings of a recipe that are arguments of the trainer in Python.
_OF_TRAINER = {
    **{name: name for name in ("model", "ref_model", "train_dataset", "eval_dataset")},
    "tokenizer": "processing_class",
    "peft": "peft_config",
}
# Former flags of the command `judge`.
_RENAMED_IN_JUDGE = {"reward_model": "model", "endpoint": "base_url"}
_OF_RECIPE = ("sft", "score_tokens", "model_config", "dry_run", "overwrite")


def _inverted(table: dict[str, str]) -> dict[str, str]:
    return {name: ours for ours, names in table.items() for name in names.split()}


_ADVICE, _LOSSES = _inverted(_TABLE), _inverted(_TABLE_OF_LOSSES)
_IN_PEFT = {name: ours[5:] for name, ours in _ADVICE.items() if ours.startswith("peft.")}
_IN_PEFT |= _inverted(_TABLE_OF_PEFT)
_NAME = re.compile(r"[a-z_0-9]+(\.[a-z_]+)?")


def advice(name: str, known: Collection[str], value: Any = None) -> str | None:
    """What to use instead of another library's name, as part of a message; None if unknown.

    Args:
        known: the valid names; only these are recommended.
        value: its value, if known: losses have other names too.
    """
    if "target_modules" in known and "learning_rate" not in known:
        return f"use {_IN_PEFT[name]}" if name in _IN_PEFT else None
    if name in _RENAMED_IN_JUDGE and "base_url" in known:
        return f"use {_RENAMED_IN_JUDGE[name]}, as in a recipe"
    if name not in _ADVICE or "learning_rate" not in known:
        return None
    text = _ADVICE[name]
    if _NAME.fullmatch(text) is None:
        return text
    section, _, inner = text.partition(".")
    if section not in known:  # a reward model has no reference, for example
        return "it is not supported here"
    if section == "loss":
        ours = loss_name(value)
        return loss_advice(value) if ours == "" else f"use loss: {ours}" if ours else "use loss"
    if text == "peft":
        return "use peft, for example peft: {r: 16, target_modules: all-linear}"
    return f"use {section}: {{{inner}: ...}}" if inner else f"use {section}"


def advice_in_python(name: str, known: Collection[str], value: Any = None) -> str | None:
    """`advice` for an argument of a settings class; some settings are arguments of the trainer."""
    if name in _OF_RECIPE and name not in known:
        return "it is available only in recipes"
    section, _, inner = _ADVICE.get(name, name).partition(".")
    if section in ("peft", "ref_model") and "loss" not in known:
        return "it is not supported here"  # a reward model has neither
    if section in _OF_TRAINER and section not in known:
        example = "=LoraConfig(...)" if section == "peft" else ""
        return f"use {_OF_TRAINER[section]}{example}, an argument of the trainer"
    if inner and section in known:
        return f"use {section}={{{inner!r}: ...}}"
    if section == "loss" and loss_name(value) and section in known:
        return f"use loss={loss_name(value)!r}"
    return advice(name, known, value)


def loss_name(value: Any) -> str | None:
    """Our name for another library's loss: "" if there is no such method, None if unknown."""
    return _LOSSES.get(value.lower().replace("-", "_")) if isinstance(value, str) else None


def loss_advice(value: Any) -> str | None:
    """What to use instead of another library's loss, as part of a message; None if unknown."""
    if value == "cdpo":
        return "use loss: dpo with label_smoothing"
    ours = loss_name(value)
    if ours is None:
        return None
    if ours:
        return f"it is called {ours} here"
    return f"the loss {value} is not available; `tokenratio methods` lists those that are"
