"""`tokenratio train RECIPE.yaml [--field value ...]`: perhaps an SFT stage, then the run."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import yaml
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenratio.cli.arguments import read_command
from tokenratio.cli.folders import EVAL_FILE, STAGE_FILE, claim_folder
from tokenratio.cli.recipe import Recipe, ResolvedRecipe, Stage, recipe_fields, resolve
from tokenratio.cli.starting import (
    adapter_size,
    config_of,
    lora_of,
    policy_of,
    source_of,
    tokenizer_of,
)
from tokenratio.cli.terminal import is_terminal, quiet_libraries, use_terminal, user_mistakes
from tokenratio.data import prepare_completions, prepare_pairs, read_rows, source_digest
from tokenratio.evaluation.generation import policy_sampler
from tokenratio.training.memory import estimate_memory
from tokenratio.training.models import load_model, load_tokenizer
from tokenratio.training.reference import model_digest
from tokenratio.training.run_folder import mask_secrets, replace_text
from tokenratio.training.trainer import TokenRatioTrainer

# What does not change the weights a stage ends with.
_NOT_IN_KEY = ("output_dir", "run_name", "logging_dir", "disable_tqdm", "resume_from_checkpoint")
_LONGEST_WORLD_RESPONSE = 64
HELP = """usage: tokenratio train RECIPE.yaml [--field value ...]

A recipe's keys and the flags are the same; flags win. See recipes/ for examples.
"""


def run(argv: list[str]) -> int:
    """The command; see `HELP`."""
    command = read_command(argv, HELP, recipe_fields(), argument="one recipe")
    if command is None:
        return 0
    quiet_libraries()
    resolved = resolve(*command, {"disable_tqdm": not is_terminal()})
    if resolved.recipe.dry_run:
        print(dry_run(resolved))
        return 0
    train(resolved)
    return 0


def dry_run(resolved: ResolvedRecipe) -> str:
    """Everything a run would use: settings, data, memory; no training, no files."""
    recipe = resolved.recipe
    tokenizer = tokenizer_of(recipe, resolved.main.args.model_init_kwargs)
    config = config_of(recipe, tokenizer)
    named = {k: v for k, v in dataclasses.asdict(recipe).items() if v is not None}
    parts = [yaml.safe_dump({"recipe": named}, sort_keys=False)]
    for name, stage in (("sft", resolved.sft), ("main", resolved.main)):
        if stage is None:
            continue
        args = stage.args
        settings = json.loads(json.dumps(mask_secrets(args.to_dict()), default=str))
        settings = {k: v for k, v in settings.items() if v is not None}
        parts.append(yaml.safe_dump({name: settings}, sort_keys=False))
        prepare = prepare_completions if args.loss == "sft" else prepare_pairs
        limits = {"max_length": args.max_length, "max_prompt_length": args.max_prompt_length}
        for source in filter(None, (stage.train_dataset, stage.eval_dataset)):
            data = prepare(source_of(source), tokenizer, on_bad_row=args.on_bad_row, **limits)
            parts.append(f"{name}: {source}\n{data.report.summary()}\n")
        is_main = name == "main"
        estimate = estimate_memory(
            config,
            args,
            tokens_per_row=args.max_length or config.get_text_config().max_position_embeddings,
            trainable_parameters=adapter_size(config, recipe.peft)
            if is_main and recipe.peft
            else None,
            reference_copy=recipe.ref_model is not None or not recipe.peft,
        )
        parts.append(f"{name}, rows of {args.max_length} tokens: {estimate}\n")
    return "\n".join(parts)


def train(resolved: ResolvedRecipe) -> dict[str, float]:
    """Run all stages of a recipe; returns the held-out metrics of the last."""
    recipe, args = resolved.recipe, resolved.main.args
    if not _resume(args.resume_from_checkpoint):
        with args.main_process_first():
            if args.should_save:
                _claim(recipe, resolved.main)
    tokenizer = tokenizer_of(recipe, args.model_init_kwargs)
    if resolved.sft is not None:
        folder = _sft_stage(recipe, resolved.sft, tokenizer)
        model, tokenizer = load_model(folder), load_tokenizer(folder)
    else:
        model = policy_of(recipe, resolved.main, tokenizer)
    peft_config = None if recipe.peft is None else lora_of(recipe.peft)
    metrics = _run_stage(
        resolved.main, model, tokenizer, ref_model=recipe.ref_model, peft_config=peft_config
    )
    # Or a process that ends first may be aborted by the threads of its process group.
    args.distributed_state.wait_for_everyone()
    args.distributed_state.destroy_process_group()
    return metrics


def _claim(recipe: Recipe, stage: Stage) -> None:
    claim_folder(
        Path(stage.args.output_dir),
        overwrite=recipe.overwrite,
        inputs=(recipe.model, recipe.ref_model),
    )


def _sft_stage(recipe: Recipe, stage: Stage, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Run the first stage unless it has been run, and return its folder.

    The folder's name holds a digest of all the stage depends on: another seed, model, tokenizer or
    data set has another folder, so that adapters trained on the old one keep their base.
    """
    args = stage.args
    model = policy_of(recipe, stage, tokenizer)
    key = _stage_key(stage, model, tokenizer)
    is_named = "output_dir" in (recipe.sft or {})
    folder = Path(args.output_dir if is_named else f"{args.output_dir}-{key[:8]}")
    args.output_dir = str(folder)
    if _is_done(folder, key):
        _say(stage, f"sft: {folder} has the same settings and data; using it")
        return folder
    # All processes have looked before the first one clears the folder, and wait for it.
    args.distributed_state.wait_for_everyone()
    with args.main_process_first():
        if args.should_save:
            claim_folder(
                folder,
                overwrite=recipe.overwrite or not is_named,
                inputs=(recipe.model, recipe.ref_model),
            )
    _run_stage(stage, model, tokenizer)
    if args.should_save:
        replace_text(folder / STAGE_FILE, json.dumps({"key": key}) + "\n")
    args.distributed_state.wait_for_everyone()
    return folder


def _is_done(folder: Path, key: str) -> bool:
    try:
        done = json.loads((folder / STAGE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(done.get("key") == key)


def _stage_key(stage: Stage, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what a stage depends on, by content: an equal one need not be run again."""
    document = {
        "model": model_digest(model),
        "config": model.config.to_dict(),
        "tokenizer": tokenizer.backend_tokenizer.to_str()
        if tokenizer.is_fast
        else sorted(tokenizer.get_vocab().items()),
        "special_tokens": tokenizer.special_tokens_map,
        "chat_template": tokenizer.chat_template,
        "settings": {k: v for k, v in stage.args.to_dict().items() if k not in _NOT_IN_KEY},
        "data": source_digest(read_rows(source_of(stage.train_dataset))),
    }
    text = json.dumps(document, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _run_stage(
    stage: Stage,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    ref_model: str | None = None,
    peft_config: LoraConfig | None = None,
) -> dict[str, float]:
    args = stage.args
    sampler = policy_sampler(
        model, tokenizer, max_new_tokens=_LONGEST_WORLD_RESPONSE, seed=args.seed
    )
    with user_mistakes("the run cannot be set up"):
        trainer = TokenRatioTrainer(
            model,
            ref_model=ref_model,
            args=args,
            train_dataset=source_of(stage.train_dataset, sampler),
            eval_dataset=stage.eval_dataset and source_of(stage.eval_dataset, sampler),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
    use_terminal(trainer)
    _say(stage, f"{args.loss}: {stage.train_dataset}\n{trainer.train_data.report.summary()}")
    if trainer.reference is not None:
        _say(stage, f"reference: {trainer.reference.description}")
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    estimate = estimate_memory(
        model.config,
        args,
        tokens_per_row=trainer.train_data.longest,
        trainable_parameters=None if peft_config is None else trainable,
        reference_copy=ref_model is not None or peft_config is None,
    )
    _say(stage, f"rows of up to {trainer.train_data.longest} tokens; {estimate.brief}")
    try:
        result = trainer.train(resume_from_checkpoint=_resume(args.resume_from_checkpoint))
    except Exception:
        if trainer.state.global_step > 0:
            raise
        # Optimizers, schedules and samplers are only built now.
        with user_mistakes("the run cannot be started"):
            raise
    trainer.save_model()
    _say(stage, f"{args.loss}: {result.global_step} steps, saved in {args.output_dir}")
    if stage.eval_dataset is None:
        return {}
    metrics = trainer.evaluate()
    if args.should_save:
        replace_text(Path(args.output_dir) / EVAL_FILE, json.dumps(metrics, indent=2) + "\n")
    _say(stage, _held_out(metrics, len(trainer.eval_data.dataset)))
    return metrics


def _say(stage: Stage, text: str) -> None:
    if stage.args.process_index == 0:
        print(text, flush=True)


def _held_out(metrics: dict[str, float], num_rows: int) -> str:
    accuracy = metrics.get("eval_rewards/accuracies")
    if accuracy is None:
        return f"held out: loss {metrics['eval_loss']:.4f} ({num_rows} rows)"
    error = math.sqrt(accuracy * (1 - accuracy) / num_rows)
    return (
        f"held out: reward accuracy {accuracy:.3f} ± {error:.3f} (standard error, {num_rows} "
        f"pairs), margin {metrics['eval_rewards/margins']:.4f}, loss {metrics['eval_loss']:.4f}"
    )


def _resume(value: str | None) -> str | bool | None:
    if value is None or value.lower() in ("true", "false"):
        return value is not None and value.lower() == "true"
    return value
