"""Runs a recipe of `tokenratio train`: its SFT stage, its token scores, then the run."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from tokenratio.cli.contrast_stage import score_stage, scores_of_run
from tokenratio.cli.folders import claim_output
from tokenratio.cli.recipe import TRAINED, Recipe, ResolvedRecipe, Stage
from tokenratio.cli.recipe_models import (
    adapter_size,
    config_of,
    policy_of,
    sources_of,
    tokenizer_of,
)
from tokenratio.cli.stages import (
    by_role,
    is_done,
    leave_together,
    mark_done,
    report,
    resume_of,
    stage_key,
    train_policy,
)
from tokenratio.cli.terminal import user_mistakes
from tokenratio.data import source_name
from tokenratio.data.sources import needs_policy
from tokenratio.models.loading import load_model, load_tokenizer
from tokenratio.models.pretrained_arguments import WHERE_KWARGS
from tokenratio.models.provenance import chain_of
from tokenratio.run_folder import mask_secrets
from tokenratio.training.adapter_settings import peft_config_of
from tokenratio.training.arguments import check_machine
from tokenratio.training.memory import estimate_memory
from tokenratio.training.pair_config import encode_source
from tokenratio.training.run_checks import check_settings, refuse_dtype


def dry_run(resolved: ResolvedRecipe) -> str:
    """Everything a run would use, as text: settings, data, memory.

    Writes only the prepared data, into the cache that the run reads it from.
    """
    recipe = resolved.recipe
    _check_stages(resolved, dry=True)
    tokenizer = tokenizer_of(recipe, resolved.main.args)
    config = config_of(recipe, tokenizer, resolved.main.args)
    named = {k: v for k, v in dataclasses.asdict(recipe).items() if v is not None}
    parts = [yaml.safe_dump({"recipe": named}, sort_keys=False)]
    if resolved.contrast is not None:
        contrast = {k: v for k, v in vars(resolved.contrast).items() if k != "dpo"}
        parts.append(yaml.safe_dump({"score_tokens": contrast}, sort_keys=False))
    for name, stage in _stages(resolved).items():
        args = stage.args
        settings = json.loads(json.dumps(mask_secrets(args.to_dict()), default=str))
        settings = {k: v for k, v in settings.items() if v is not None}
        parts.append(yaml.safe_dump({name: settings}, sort_keys=False))
        for source, role in by_role(args, stage.train_dataset, stage.eval_dataset):
            found = "its pairs are drawn from the policy when the run begins"
            if not needs_policy(source):
                found = encode_source(source, tokenizer, args, role=role).summary()
            parts.append(f"{name}, {role}: {source_name(source)}\n{found}\n")
        # Without a new adapter, that of the starting policy is trained further.
        settings = _adapter_of(resolved, stage) if stage.peft is None else stage.peft
        estimate = estimate_memory(
            config,
            args,
            tokens_per_row=args.max_length or config.get_text_config().max_position_embeddings,
            trainable_parameters=None if settings is None else adapter_size(config, settings),
            reference_copy=recipe.ref_model is not None or settings is None,
        )
        parts.append(f"{name}, rows of {args.max_length} tokens: {estimate}\n")
    return "\n".join(parts)


def _stages(resolved: ResolvedRecipe) -> dict[str, Stage]:
    """The stages that a recipe trains, in order."""
    contrast = resolved.contrast
    dpo = None
    if contrast is not None and {contrast.positive, contrast.negative} & set(TRAINED):
        dpo = contrast.dpo
    stages = {"sft": resolved.sft, "score_tokens": dpo, "main": resolved.main}
    return {name: stage for name, stage in stages.items() if stage is not None}


def _check_stages(resolved: ResolvedRecipe, *, dry: bool) -> None:
    """Refuse settings of any stage that would fail, before the first stage begins.

    Args:
        dry: nothing will be run, so this machine is not checked.
    """
    for stage in _stages(resolved).values():
        if not dry:
            check_machine(stage.args)
        check_settings(stage.args, stage.eval_dataset)
        dtype = (stage.args.model_init_kwargs or {}).get("dtype")
        is_coarse = dtype in ("bfloat16", "float16") and stage.peft is None
        if is_coarse and _adapter_of(resolved, stage) is None:
            refuse_dtype(getattr(torch, dtype), stage.args.learning_rate)


def train(resolved: ResolvedRecipe) -> None:
    """Run all stages of a recipe."""
    recipe, main = resolved.recipe, resolved.main
    args = main.args
    for stage in (resolved.sft, main):
        if stage is not None and stage.peft is not None:
            peft_config_of(stage.peft)  # reports mistakes before a folder is claimed
    _check_stages(resolved, dry=False)
    resume = resume_of(args)
    if not resume:
        claim_output(args, overwrite=recipe.overwrite, inputs=_inputs(recipe))
    tokenizer = tokenizer_of(recipe, args)
    if resolved.sft is not None:
        folder = _sft_stage(recipe, resolved.sft, tokenizer)
        # Settings of where the starting policy is loaded from do not apply to the stage's folder.
        given = (args.model_init_kwargs or {}).items()
        how = {name: value for name, value in given if name not in WHERE_KWARGS}
        model, tokenizer = load_model(folder, how), load_tokenizer(folder)
    else:
        model = policy_of(recipe, main, tokenizer)
    sources = sources_of(main, model, tokenizer)
    if resolved.contrast is not None:
        args.token_scores = scores_of_run(resume, args.output_dir) or str(
            score_stage(resolved.contrast, main, model, tokenizer, sources)
        )
    train_policy(main, model, tokenizer, sources=sources, ref_model=recipe.ref_model)
    leave_together(args)


def _adapter_of(resolved: ResolvedRecipe, stage: Stage) -> PeftConfig | dict[str, Any] | None:
    """The settings of the adapter that a stage's starting policy has."""
    sft, name = resolved.sft, resolved.recipe.model
    if sft is not None and stage is not sft and sft.peft is not None:
        return sft.peft
    adapters = () if name is None else chain_of(name, stage.args.model_init_kwargs)[2]
    if not adapters:
        return None
    with user_mistakes(f"cannot read the adapter {adapters[-1].name}"):
        config = PeftConfig.from_pretrained(adapters[-1].name, **adapters[-1].where)
    config.inference_mode = False
    return config


def _inputs(recipe: Recipe) -> tuple[str, ...]:
    """All folders and files that a run reads its models from, including the bases of adapters."""
    parts: list[str] = []
    for name in (recipe.model, recipe.ref_model):
        if name is not None and Path(name).exists():
            base, _, adapters = chain_of(name)
            parts += [base, *(adapter.name for adapter in adapters)]
    return tuple(part for part in parts if Path(part).exists())


def _sft_stage(recipe: Recipe, stage: Stage, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Run the SFT stage unless it has been run; returns its folder.

    By default the folder's name has a digest of everything the stage depends on, so that a changed
    stage gets a new folder and adapters trained on the old one keep their base.
    """
    args = stage.args
    model = policy_of(recipe, stage, tokenizer)
    sources = sources_of(stage, model, tokenizer)
    key = stage_key(replace(stage, train_dataset=sources[0]), model, tokenizer)
    is_named = "output_dir" in (recipe.sft or {})
    folder = Path(args.output_dir if is_named else f"{args.output_dir}-{key[:8]}")
    args.output_dir = str(folder)
    if is_done(folder, key):
        report(args, f"sft: {folder} has the same settings and data; using it")
        return folder
    # All processes must have looked before the first one clears the folder.
    args.distributed_state.wait_for_everyone()
    claim_output(args, overwrite=recipe.overwrite or not is_named, inputs=_inputs(recipe))
    train_policy(stage, model, tokenizer, sources=sources)
    if args.should_save:
        mark_done(folder, key)
    args.distributed_state.wait_for_everyone()
    return folder
