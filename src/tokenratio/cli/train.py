"""`tokenratio train RECIPE.yaml [--field value ...]`: perhaps an SFT stage, then the run."""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from tokenratio.cli.arguments import describe, read_flags
from tokenratio.cli.recipe import Recipe, ResolvedRecipe, Stage, recipe_fields, resolve
from tokenratio.cli.terminal import is_terminal, quiet_libraries, use_terminal
from tokenratio.data import parse_completion, parse_preference, read_rows, source_digest
from tokenratio.data.vocabulary import train_byte_level_bpe
from tokenratio.data.worlds import WORLDS, is_world_source, world_rows
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.generation import policy_sampler
from tokenratio.training.memory import estimate_memory
from tokenratio.training.models import load_model, load_tokenizer
from tokenratio.training.run_folder import METRICS_FILE, RUN_FILE, replace_text
from tokenratio.training.trainer import TokenRatioTrainer

_STAGE_FILE = "stage.json"
_EVAL_FILE = "eval.json"
# What does not change the weights a stage ends with.
_NOT_IN_KEY = ("output_dir", "run_name", "logging_dir", "disable_tqdm", "resume_from_checkpoint")
_LONGEST_WORLD_RESPONSE = 64
HELP = """usage: tokenratio train RECIPE.yaml [--field value ...]

A recipe's keys and the flags are the same; flags win. See recipes/ for examples.
"""


def run(argv: list[str]) -> int:
    """The command; see `HELP`."""
    if "--help" in argv or "-h" in argv:
        print(HELP + "\n" + describe(recipe_fields()))
        return 0
    positional, flags = read_flags(argv, recipe_fields())
    if len(positional) != 1:
        raise TokenRatioError("train needs one recipe: tokenratio train RECIPE.yaml")
    quiet_libraries()
    resolved = resolve(positional[0], flags, {"disable_tqdm": not is_terminal()})
    if resolved.recipe.dry_run:
        print(dry_run(resolved))
        return 0
    train(resolved)
    return 0


def dry_run(resolved: ResolvedRecipe) -> str:
    """Everything a run would use, with its memory estimate; no training, no files."""
    tokenizer = _tokenizer(resolved.recipe)
    config = _model_config(resolved.recipe, tokenizer)
    recipe = {k: v for k, v in dataclasses.asdict(resolved.recipe).items() if v is not None}
    parts = [yaml.safe_dump({"recipe": recipe}, sort_keys=False)]
    stages = {"sft": resolved.sft, "main": resolved.main}
    for name, stage in stages.items():
        if stage is None:
            continue
        settings = json.loads(json.dumps(stage.args.to_dict(), default=str))
        settings = {k: v for k, v in settings.items() if v is not None}
        parts.append(yaml.safe_dump({name: settings}, sort_keys=False))
        adapter = None
        if name == "main" and resolved.recipe.peft is not None:
            adapter = _adapter_parameters(config, _lora(resolved.recipe.peft))
        longest = stage.args.max_length or config.get_text_config().max_position_embeddings
        estimate = estimate_memory(
            config, stage.args, tokens_per_row=longest, trainable_parameters=adapter
        )
        parts.append(f"{name}, rows of {longest} tokens: {estimate}\n")
    return "\n".join(parts)


def train(resolved: ResolvedRecipe) -> dict[str, float]:
    """Run all stages of a recipe; returns the held-out metrics of the last."""
    recipe = resolved.recipe
    with resolved.main.args.main_process_first():
        _claim_folder(resolved.main, recipe)
    if resolved.sft is not None:
        _sft_stage(recipe, resolved.sft)
        folder = resolved.sft.args.output_dir
        model, tokenizer = load_model(folder), load_tokenizer(folder)
    else:
        model, tokenizer = _start(recipe, resolved.main)
    peft_config = None if recipe.peft is None else _lora(recipe.peft)
    metrics = _run_stage(
        resolved.main, model, tokenizer, ref_model=recipe.ref_model, peft_config=peft_config
    )
    # Or a process that ends first may be aborted by the threads of its process group.
    resolved.main.args.distributed_state.wait_for_everyone()
    resolved.main.args.distributed_state.destroy_process_group()
    return metrics


def _sft_stage(recipe: Recipe, stage: Stage) -> None:
    folder = Path(stage.args.output_dir)
    key = _stage_key(recipe, stage)
    if _is_done(folder, key):
        _say(stage, f"sft: {folder} has the same settings and data; using it")
        return
    # All processes have looked before the first one clears the folder, and wait for it.
    stage.args.distributed_state.wait_for_everyone()
    with stage.args.main_process_first():
        if stage.args.should_save:
            _remove_run(folder)
    model, tokenizer = _start(recipe, stage)
    _run_stage(stage, model, tokenizer)
    if stage.args.should_save:
        replace_text(folder / _STAGE_FILE, json.dumps({"key": key}) + "\n")


def _is_done(folder: Path, key: str) -> bool:
    try:
        done = json.loads((folder / _STAGE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(done.get("key") == key)


def _stage_key(recipe: Recipe, stage: Stage) -> str:
    """What a finished stage depends on; an equal key means it need not be run again."""
    rows = _source(stage.train_dataset, None)
    settings = {k: v for k, v in stage.args.to_dict().items() if k not in _NOT_IN_KEY}
    document = {
        "model": recipe.model,
        "model_config": recipe.model_config,
        "tokenizer": recipe.tokenizer,
        "settings": settings,
        "data": source_digest(read_rows(rows)),
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
    trainer = TokenRatioTrainer(
        model,
        ref_model=ref_model,
        args=args,
        train_dataset=_source(stage.train_dataset, sampler),
        eval_dataset=stage.eval_dataset and _source(stage.eval_dataset, sampler),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    use_terminal(trainer)
    _say(stage, f"{args.loss}: {stage.train_dataset}\n{trainer.train_data.report.summary()}")
    if trainer.reference is not None:
        _say(stage, f"reference: {trainer.reference.description}")
    data = trainer.train_data.dataset.with_format("numpy")
    sides = ["completion_ids"] if args.loss == "sft" else ["chosen_ids", "rejected_ids"]
    longest = max(len(row["prompt_ids"]) + max(len(row[s]) for s in sides) for row in data)
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    estimate = estimate_memory(
        model.config,
        args,
        tokens_per_row=longest,
        trainable_parameters=None if peft_config is None else trainable,
    )
    _say(stage, f"rows of up to {longest} tokens; {estimate.brief}")
    result = trainer.train(resume_from_checkpoint=_resume(args.resume_from_checkpoint))
    trainer.save_model()
    _say(stage, f"{args.loss}: {result.global_step} steps, saved in {args.output_dir}")
    if stage.eval_dataset is None:
        return {}
    metrics = trainer.evaluate()
    num_rows = len(trainer.eval_data.dataset)
    if args.should_save:
        replace_text(Path(args.output_dir) / _EVAL_FILE, json.dumps(metrics, indent=2) + "\n")
    _say(stage, _held_out(metrics, num_rows))
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


def _source(source: str, sampler: Any) -> Any:
    """A world's rows, its pairs drawn from the starting policy; other names as they are."""
    return world_rows(source, sampler=sampler) if is_world_source(source) else source


def _start(recipe: Recipe, stage: Stage) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if recipe.model is not None:
        tokenizer = load_tokenizer(recipe.model) if recipe.tokenizer is None else _tokenizer(recipe)
        return load_model(recipe.model, stage.args.model_init_kwargs), tokenizer
    tokenizer = _tokenizer(recipe)
    set_seed(stage.args.seed)
    model = AutoModelForCausalLM.from_config(_model_config(recipe, tokenizer))
    model.config.name_or_path = f"{recipe.model_config['model_type']} from the recipe's config"
    return model, tokenizer


def _tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    spec = recipe.tokenizer if recipe.tokenizer is not None else recipe.model
    if isinstance(spec, dict):
        return train_byte_level_bpe(_texts(str(recipe.train_dataset)), int(spec["byte_level_bpe"]))
    if is_world_source(spec):
        name = spec.removeprefix("world:")
        if name not in WORLDS:
            raise TokenRatioError(f"unknown world {name!r}; known: {', '.join(WORLDS)}")
        return WORLDS[name].build_tokenizer()
    return load_tokenizer(spec)


def _texts(source: str) -> Iterator[str]:
    """Every text of a data set, for training a tokenizer; rows that cannot be read are left out."""
    for row in read_rows(_source(source, None)):
        for parse in (parse_preference, parse_completion):
            try:
                example = parse(row)
            except Exception:  # counted and reported where the data is prepared
                continue
            for side in ("prompt", "chosen", "rejected", "completion"):
                text = getattr(example, side, None)
                if isinstance(text, str):
                    yield text
                elif text is not None:
                    yield from (message["content"] for message in text)
            break


def _model_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    try:
        if recipe.model is not None:
            return AutoConfig.from_pretrained(recipe.model)
        settings = dict(recipe.model_config or {})
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            settings.setdefault(name, getattr(tokenizer, name))
        settings.setdefault("vocab_size", len(tokenizer))
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    except (OSError, ValueError, TypeError) as error:
        raise TokenRatioError(f"cannot build the model: {error}") from None
    if config.vocab_size < len(tokenizer):
        raise TokenRatioError(
            f"model_config.vocab_size is {config.vocab_size}; the tokenizer has {len(tokenizer)}"
        )
    return config


def _lora(settings: dict[str, Any]) -> LoraConfig:
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **settings})
    except (TypeError, ValueError) as error:
        raise TokenRatioError(f"peft: {error}") from None


def _adapter_parameters(config: PretrainedConfig, lora: LoraConfig) -> int:
    import torch

    from tokenratio.training.models import add_adapter

    with torch.device("meta"):
        model = add_adapter(AutoModelForCausalLM.from_config(config), lora)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _resume(value: str | None) -> str | bool | None:
    if value is None or value.lower() in ("true", "false"):
        return value is not None and value.lower() == "true"
    return value


def _claim_folder(stage: Stage, recipe: Recipe) -> None:
    """Refuse to write over another run unless told to."""
    folder = Path(stage.args.output_dir)
    if not (folder / METRICS_FILE).exists() or _resume(stage.args.resume_from_checkpoint):
        return
    if not recipe.overwrite:
        raise TokenRatioError(
            f"{folder} already holds a run: continue it with --resume_from_checkpoint true, "
            "replace it with --overwrite, or choose another --output_dir"
        )
    _remove_run(folder)


def _remove_run(folder: Path) -> None:
    """Remove what a run wrote that the next one would not overwrite."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    for name in (METRICS_FILE, RUN_FILE, _STAGE_FILE, _EVAL_FILE):
        (folder / name).unlink(missing_ok=True)
