"""What can be known before the first step is said before the first step."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from transformers import EarlyStoppingCallback

from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio import TokenRatioConfig, TokenRatioTrainer
from tokenratio.errors import TokenRatioError
from tokenratio.losses import METHODS
from tokenratio.models.reward_model import load_reward_model
from tokenratio.training import arguments, run_checks, wrappers
from tokenratio.training.metrics import GREATER_IS_BETTER, greater_is_better
from tokenratio.training.reward_trainer import RewardConfig, RewardTrainer

BESIDE = {"runtime", "samples_per_second", "steps_per_second", "epoch"}
BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
}


def config(folder, kind=TokenRatioConfig, **settings):
    quiet = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 2}
    sizes = {"max_length": 32, "per_device_train_batch_size": 2}
    if kind is TokenRatioConfig:
        sizes["baseline_hidden_size"] = 16
    return kind(**{"output_dir": str(folder), **quiet, **sizes, **settings})


def trainer_of(args, *, model=None, evaluated=None, **options):
    return TokenRatioTrainer(
        tiny_model() if model is None else model,
        args=args,
        train_dataset=word_pairs(8),
        eval_dataset=word_pairs(4, seed=1) if evaluated is None else evaluated,
        processing_class=tiny_tokenizer(),
        **options,
    )


# --- which metrics there are ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        *({"loss": name} for name in METHODS if name not in ("tis_dpo", "sepo", "t_reg")),
        {"loss": "sft"},
        {"loss": "dpo", "cache_reference": True},
        {"loss": "tbpo_a", "sft_weight": 0.1},
        {"loss": "tbpo_q", "prediction_loss_only": True},
    ],
    ids=str,
)
def test_the_metrics_named_beforehand_are_those_an_evaluation_reports(settings, tmp_path):
    args = config(tmp_path, reference_cache_dir=str(tmp_path), **settings)
    reported = trainer_of(args).evaluate()
    names = {name.removeprefix("eval_") for name in reported} - BESIDE
    assert names - {"model_preparation_time"} == set(args.evaluated_metrics())


def test_the_metrics_of_a_reward_model_likewise(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    args = config(tmp_path / "run", RewardConfig)
    model = load_reward_model(tmp_path / "model", seed=0)
    pairs = word_pairs(8)
    trainer = RewardTrainer(model, args, pairs, pairs, processing_class=tiny_tokenizer())
    names = {name.removeprefix("eval_") for name in trainer.evaluate()} - BESIDE
    assert names - {"model_preparation_time"} == set(args.evaluated_metrics())


def test_every_metric_has_a_direction_or_asks_for_one(tmp_path):
    losses = [*METHODS, "sft"]
    measured = {
        name for loss in losses for name in config(tmp_path, loss=loss).evaluated_metrics()
    } | set(config(tmp_path, sft_weight=0.1).evaluated_metrics())
    assert measured == set(GREATER_IS_BETTER)


@pytest.mark.parametrize(
    ("metric", "is_greater"),
    [
        (None, False),  # the loss
        ("eval_loss", False),
        ("rewards/accuracies", True),
        ("eval_rewards/margins", True),
        ("kl_ref_policy", False),
        ("eval_log_ratio/max_abs", False),
        ("eval_near_kl_ref_policy", False),
        ("eval_far_rewards/chosen", True),
    ],
)
def test_the_better_direction_is_that_of_the_metric(metric, is_greater, tmp_path):
    args = config(tmp_path, **BEST, metric_for_best_model=metric)
    assert args.greater_is_better is is_greater
    other = config(tmp_path, **BEST, metric_for_best_model=metric, greater_is_better=not is_greater)
    assert other.greater_is_better is not is_greater


def test_a_metric_without_a_direction_asks_for_one(tmp_path):
    assert greater_is_better("eval_log_ratio/mean") is None
    with pytest.raises(TokenRatioError, match="set greater_is_better to true or false"):
        config(tmp_path, **BEST, metric_for_best_model="log_ratio/mean")
    config(tmp_path, **BEST, metric_for_best_model="log_ratio/mean", greater_is_better=False)


@pytest.mark.parametrize(
    ("metric", "hint"),
    [
        ("eval_accuracy", "did you mean eval_rewards/accuracies"),
        ("eval_reward/accuracies", "did you mean eval_rewards/accuracies"),
        ("rewards/margin", "did you mean eval_rewards/margins"),
        ("eval_sft_anchor", "known: eval_loss"),
        ("bleu", "known: eval_loss"),
    ],
)
def test_a_metric_that_is_not_measured_is_refused(metric, hint, tmp_path):
    args = config(tmp_path, **BEST, metric_for_best_model=metric)
    with pytest.raises(TokenRatioError, match=f"{metric} is not measured") as refusal:
        trainer_of(args)
    assert hint in str(refusal.value)


@pytest.mark.parametrize("metric", ["eval_rewards/accuracies", "rewards/accuracies", "loss"])
def test_a_metric_that_is_measured_decides(metric, tmp_path):
    trainer = trainer_of(config(tmp_path, **BEST, metric_for_best_model=metric))
    trainer.train()
    assert trainer.state.best_metric is not None


def test_with_several_held_out_sets_the_name_has_its_set_in_it(tmp_path):
    evaluated = {"near": word_pairs(4, seed=1), "far": word_pairs(4, seed=2), "none": None}
    for metric in ("eval_loss", "eval_none_loss", "middle_loss"):
        args = config(tmp_path, **BEST, metric_for_best_model=metric)
        with pytest.raises(TokenRatioError, match=r"is not measured.*eval_near_loss"):
            trainer_of(args, evaluated=evaluated)
    for metric in ("eval_far_loss", "near_rewards/margins"):
        args = config(tmp_path, **BEST, metric_for_best_model=metric)
        trainer = trainer_of(args, evaluated=evaluated)
        trainer.train()
        assert trainer.state.best_metric is not None


# --- settings that would fail later ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load_best_model_at_end": True}, "load_best_model_at_end needs an eval_strategy"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "save_strategy best needs an"),
        ({"lr_scheduler_kwargs": {"foo": 1}}, "lr_scheduler_kwargs .*foo"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
        ({"optim_args": "momentun=0.9"}, "rmsprop has no argument momentun"),
        ({"optim_args": "momentum"}, "optim_args must be `name=value"),
        ({"optim_args": "alpha=high"}, "optim rmsprop with optim_args alpha=high"),
        ({"optim": "adamw_bnb_8bit"}, "bitsandbytes"),
        ({"learning_rate": -1.0}, "learning rate"),
        (
            {"report_to": "wandb"},
            "report_to wandb: transformers does not know this tracker, or its package is not",
        ),
        ({"report_to": ["tensorbord"]}, "report_to tensorbord"),
    ],
)
def test_settings_that_would_fail_later_are_refused(settings, message, tmp_path):
    with pytest.raises(TokenRatioError, match=message):
        trainer_of(config(tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("optim", "optim_args"),
    [
        ("rmsprop", "alpha=0.9, momentum=0.5"),
        ("sgd", "momentum=0.9,nesterov=true"),
        ("adamw_torch", None),
        ("adafactor", None),
    ],
)
def test_optimizers_and_their_arguments(optim, optim_args, tmp_path):
    trainer_of(config(tmp_path, optim=optim, optim_args=optim_args)).train()


def test_an_evaluation_needs_data(tmp_path):
    for kind in (TokenRatioConfig, RewardConfig):
        args = config(tmp_path, kind, eval_strategy="steps", eval_steps=1)
        with pytest.raises(TokenRatioError, match="eval_strategy steps needs an eval_dataset"):
            run_checks.check_run(args, kind, None)


def test_early_stopping_needs_something_to_compare(tmp_path):
    stop = [EarlyStoppingCallback()]
    with pytest.raises(TokenRatioError, match="early stopping needs an eval_strategy"):
        trainer_of(config(tmp_path), callbacks=stop)
    evaluating = {"eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(TokenRatioError, match="early stopping needs metric_for_best_model"):
        trainer_of(config(tmp_path, **evaluating), callbacks=stop)
    trainer_of(config(tmp_path, **BEST), callbacks=stop).train()


def test_an_output_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(TokenRatioError, match=r"output_dir .*file/run cannot be written to"):
        trainer_of(config(tmp_path / "file" / "run"))
    with pytest.raises(TokenRatioError, match="output_dir /proc/run cannot be written to"):
        trainer_of(config("/proc/run"))


def test_uploading_needs_a_token(tmp_path, monkeypatch):
    monkeypatch.setattr(run_checks.huggingface_hub, "get_token", lambda: None)
    with pytest.raises(TokenRatioError, match="push_to_hub needs a token"):
        trainer_of(config(tmp_path, push_to_hub=True))


# --- settings that are not supported --------------------------------------------------------------


@pytest.mark.parametrize("kind", [TokenRatioConfig, RewardConfig])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "FSDP version 1.*set fsdp_version: 2"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha must be unset.*policy and reference"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size must be false"),
        ({"ignore_data_skip": True}, "ignore_data_skip must be false"),
        ({"bf16_full_eval": True}, "bf16_full_eval must be false"),
        ({"fp16_full_eval": True}, "fp16_full_eval must be false"),
        ({"label_names": ["labels"]}, "label_names must be unset"),
        ({"include_for_metrics": ["inputs"]}, "include_for_metrics must be unset"),
        ({"batch_eval_metrics": True}, "batch_eval_metrics must be false"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches must be true"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices must be true"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be false"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"),
        ({"optim": "adamw_troch"}, "unknown optim 'adamw_troch'; did you mean 'adamw_torch'"),
        ({"lr_scheduler_type": "cosin"}, "did you mean 'cosine'"),
        ({"eval_strategy": "sometimes"}, "eval_strategy must be one of no, steps, epoch"),
        ({"save_strategy": "epochs"}, "did you mean 'epoch'"),
        ({"bf16": True, "fp16": True}, "At most one of fp16 and bf16"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"load_best_model_at_end": True, "save_strategy": "epoch"}, "save and eval strategy"),
        (
            {**BEST, "eval_steps": 2, "save_steps": 3},
            "saving steps to be a round multiple of the evaluation steps",
        ),
    ],
    ids=str,
)
def test_settings_that_do_not_go_with_pairs_are_refused_by_name(kind, settings, message, tmp_path):
    with pytest.raises(TokenRatioError, match=message):
        config(tmp_path, kind, **settings)


@pytest.mark.parametrize("settings", [{"deepspeed": "zero3.json"}, {}], ids=str)
def test_deepspeed_that_is_not_installed_is_refused(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(wrappers.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", str(not settings))
    with pytest.raises(TokenRatioError, match=r"not installed: pip install 'tokenratio\[deepspeed"):
        config(tmp_path, **settings)


@pytest.mark.parametrize("by_launcher", [True, False])
def test_fsdp_that_accelerate_would_leave_out_is_refused(by_launcher, tmp_path, monkeypatch):
    """On CPUs it trains with plain DDP, in one process it wraps nothing, both silently."""
    if by_launcher:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
    args = config(tmp_path, **({} if by_launcher else {"fsdp": True}))
    with pytest.raises(TokenRatioError, match=r"FSDP is asked for.*in one process.*leave FSDP out"):
        arguments.check_machine(args)
    kind = DistributedType.MULTI_CPU
    args.distributed_state = SimpleNamespace(distributed_type=kind, num_processes=2)
    with pytest.raises(TokenRatioError, match=r"on a CPU.*plain DDP"):
        arguments.check_machine(args)
    args.distributed_state.distributed_type = DistributedType.MULTI_GPU
    arguments.check_machine(args)


def test_every_process_loads_the_whole_model(tmp_path, caplog):
    args = config(tmp_path, fsdp="true", fsdp_config={"cpu_ram_efficient_loading": True})
    assert not args.fsdp_plugin_args["cpu_ram_efficient_loading"]
    assert "cpu_ram_efficient_loading is turned off" in caplog.text


# --- the machine ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TokenRatioConfig, RewardConfig])
def test_a_recipe_for_a_gpu_can_be_read_without_one(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(arguments, "default_device", lambda: torch.device("cpu"))
    args = config(tmp_path, kind, bf16=True, tf32=True, use_cpu=False)
    assert args.bf16
    assert args.use_cpu
    assert args.tf32
    with pytest.raises(TokenRatioError, match="tf32 needs a GPU"):
        arguments.check_machine(args)
    args = config(tmp_path, kind, fp16=True, use_cpu=False)
    with pytest.raises(TokenRatioError, match=r"fp16 needs a GPU.*use bf16"):
        arguments.check_machine(args)
    arguments.check_machine(config(tmp_path, kind, bf16=True, use_cpu=False))


def test_bfloat16_trains_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(arguments, "default_device", lambda: torch.device("cpu"))
    trainer = trainer_of(config(tmp_path, bf16=True, use_cpu=False))
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.model.dtype == torch.float32
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


# --- weights that updates reach -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_full_fine_tuning_of_coarse_weights_is_refused(dtype, tmp_path):
    name = str(dtype).removeprefix("torch.")
    for loss in ("tbpo_a", "simpo", "sft"):
        with pytest.raises(TokenRatioError, match=f"weights in {name} cannot take.*float32.*bf16"):
            trainer_of(config(tmp_path / "run", loss=loss), model=tiny_model().to(dtype))
    tiny_model().to(dtype).save_pretrained(tmp_path / "model")
    for asked in ("auto", name):
        args = config(tmp_path / "run", model_init_kwargs={"dtype": asked})
        with pytest.raises(TokenRatioError, match="updates of 5e-07, which are rounded away"):
            trainer_of(args, model=str(tmp_path / "model"))
    args = config(tmp_path / "run", RewardConfig)
    model = load_reward_model(tmp_path / "model", seed=0, init_kwargs={"dtype": name})
    with pytest.raises(TokenRatioError, match="cannot take updates"):
        RewardTrainer(model, args, word_pairs(8), processing_class=tiny_tokenizer())


def test_frozen_weights_may_be_coarse(tmp_path):
    """PEFT gives an adapter on them weights of float32."""
    adapter = LoraConfig(r=4, target_modules=["q_proj"])
    args = config(tmp_path, learning_rate=1e-3, max_steps=4)
    trainer = trainer_of(args, model=tiny_model().bfloat16(), peft_config=adapter)
    before = {n: p.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in before.values()} == {torch.float32}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    # B starts at zero, so A moves from the second step on.
    assert all((after[name] != value).any() for name, value in before.items())


@pytest.mark.parametrize("part", ["modules_to_save", "autocast_adapter_dtype"])
def test_coarse_adapters_are_refused(part, tmp_path):
    settings = {"r": 4, "target_modules": ["q_proj"]}
    if part == "modules_to_save":
        settings |= {"modules_to_save": ["lm_head"]}
        model = get_peft_model(tiny_model().bfloat16(), LoraConfig(**settings))
    else:
        model = get_peft_model(
            tiny_model().bfloat16(), LoraConfig(**settings), autocast_adapter_dtype=False
        )
    with pytest.raises(TokenRatioError, match=r"in bfloat16 cannot take.*load the model below"):
        trainer_of(config(tmp_path), model=model)
