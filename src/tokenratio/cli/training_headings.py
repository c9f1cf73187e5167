"""The settings that `train --help` and `train-reward --help` list, under their headings.

Everything of tokenratio's own is here, and of transformers' settings the common ones; `--help all`
lists the others as well.
"""

TRAINING_HEADINGS: dict[str, tuple[str, ...]] = {
    "Model": ("model", "model_config", "tokenizer", "model_init_kwargs"),
    "Data": (
        *("train_dataset", "eval_dataset", "held_out_share", "train_split", "eval_split"),
        *("max_samples", "max_eval_samples", "selection_seed", "columns", "on_bad_row"),
    ),
    "Length": ("max_length", "max_prompt_length"),
    "Method": (
        *("loss", "beta", "generator", "generator_lambda", "generator_scale", "state_weight"),
        *("aggregation", "label_smoothing", "sft_weight", "simpo_gamma", "tdpo_alpha"),
        *("tis_lower", "tis_upper", "sepo_share", "t_reg_weight", "arc_chunk_length"),
        *("arc_target_margin", "token_scores", "score_tokens"),
    ),
    "State baseline (tbpo_q)": (
        *("baseline_hidden_size", "baseline_learning_rate", "center_baseline", "baseline_clamp"),
    ),
    "Reference": ("ref_model", "cache_reference", "reference_cache_dir", "check_reference"),
    "Adapter and stages": ("peft", "sft"),
    "Optimisation": (
        *("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
        *("gradient_accumulation_steps", "optim", "lr_scheduler_type", "warmup_steps"),
        *("weight_decay", "max_grad_norm", "train_sampling_strategy", "seed", "data_seed"),
    ),
    "Precision, memory and speed": (
        *("bf16", "fp16", "activation_checkpointing", "share_prompt", "use_cpu"),
    ),
    "Output and evaluation": (
        *("output_dir", "overwrite", "resume_from_checkpoint", "resume_with_changes", "dry_run"),
        *("logging_steps", "report_to", "eval_strategy", "eval_steps"),
        *("per_device_eval_batch_size", "save_strategy", "save_steps", "save_total_limit"),
        *("load_best_model_at_end", "metric_for_best_model", "push_to_hub", "hub_model_id"),
    ),
    "Chat template": ("chat_template", "chat_template_kwargs", "tools", "template_date"),
    "Prepared data": ("data_cache_dir", "dataset_num_proc"),
}
