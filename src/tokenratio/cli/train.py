"""Runs a recipe of `tokenratio train`: its SFT stage, its token scores, then the run."""

import dataclasses
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from tokenratio.cli.contrast_stage import score_stage, scores_of_run
from tokenratio.cli.folders import check_folder, claimed_output
from tokenratio.cli.recipe import TRAINED, Recipe, ResolvedRecipe, Stage
from tokenratio.cli.recipe_models import (
    adapter_shapes,
    config_of,
    policy_of,
    sources_of,
    tokenizer_of,
)
from tokenratio.cli.stages import (
    begin_stage,
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
from tokenratio.errors import TokenRatioError
from tokenratio.masking import mask_secrets
from tokenratio.models.loading import load_config, load_model
from tokenratio.models.pretrained_arguments import WHERE_KWARGS
from tokenratio.models.provenance import chain_of
from tokenratio.run_folder import read_run_file
from tokenratio.training.adapter_settings import peft_config_of
from tokenratio.training.arguments import check_machine
from tokenratio.training.memory import estimate_memory
from tokenratio.training.output_folder import on_first_process, output_held
from tokenratio.training.pair_config import PairConfig, encode_source
from tokenratio.training.run_checks import check_settings, refuse_dtype
from tokenratio.training.run_record import check_same_settings
from tokenratio.training.wrappers import asks_for_deepspeed, asks_for_fsdp


def dry_run(resolved: ResolvedRecipe) -> str:
    """Everything a run would use, as text: settings, data, memory.

    Writes only the prepared data, into the cache that the run reads it from.
    """
    recipe = resolved.recipe
    _check_stages(resolved, dry=True)
    tokenizer = tokenizer_of(recipe, resolved.main.args)
    config = config_of(recipe, tokenizer, resolved.main.args)
    named = {k: v for k, v in mask_secrets(dataclasses.asdict(recipe)).items() if v is not None}
    parts = [yaml.safe_dump({"recipe": named}, sort_keys=False)]
    if resolved.contrast is not None:
        contrast = {k: v for k, v in mask_secrets(vars(resolved.contrast)).items() if k != "dpo"}
        parts.append(yaml.safe_dump({"score_tokens": contrast}, sort_keys=False))
    for name, stage in _stages(resolved).items():
        args = stage.args
        settings = json.loads(json.dumps(args.to_dict(), default=str))
        settings = {k: v for k, v in settings.items() if v is not None}
        parts.append(yaml.safe_dump({name: settings}, sort_keys=False))
        for source, role in by_role(args, stage.train_dataset, stage.eval_dataset):
            found = "its pairs are drawn from the policy when the run begins"
            if not needs_policy(source):
                found = encode_source(source, tokenizer, args, role=role).summary()
            parts.append(f"{name}, {role}: {source_name(source)}\n{found}\n")
        # Without a new adapter, that of the starting policy is trained further.
        settings = adapter_of(resolved, stage) if stage.peft is None else stage.peft
        estimate = estimate_memory(
            config,
            args,
            tokens_per_row=args.max_length or config.get_text_config().max_position_embeddings,
            adapter=None if settings is None else adapter_shapes(config, settings),
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
    contrast, main = resolved.contrast, resolved.main.args
    if contrast is not None:
        if asks_for_fsdp(main) or asks_for_deepspeed(main):
            raise TokenRatioError(
                "score_tokens is not supported with FSDP and DeepSpeed, which split the models: "
                "compute the scores first with `tokenratio score-tokens` and set token_scores to "
                "their folder"
            )
        for name in (contrast.positive, contrast.negative):
            if name not in ("reference", *TRAINED):
                load_config(name, main.model_init_kwargs)  # is there such a model?
    for stage in _stages(resolved).values():
        if not dry:
            check_machine(stage.args)
        check_settings(stage.args, stage.eval_dataset)
        dtype = (stage.args.model_init_kwargs or {}).get("dtype")
        is_coarse = dtype in ("bfloat16", "float16") and stage.peft is None
        if is_coarse and adapter_of(resolved, stage) is None:
            refuse_dtype(getattr(torch, dtype), stage.args.learning_rate)


def train(resolved: ResolvedRecipe) -> None:
    """Run all stages of a recipe."""
    recipe, main = resolved.recipe, resolved.main
    args = main.args
    for stage in (resolved.sft, main):
        if stage is not None and stage.peft is not None:
            peft_config_of(stage.peft)  # reports mistakes before a folder is claimed
    _check_stages(resolved, dry=False)
    inputs, resume = _inputs(recipe), resume_of(args)
    with claimed_output(
        args, overwrite=recipe.overwrite, inputs=inputs, resume=resume
    ) as checkpoint:
        if checkpoint is not None:
            _check_resumed(args, checkpoint)
        _train(resolved, checkpoint, resume=resume)
    leave_together(args)


def _train(resolved: ResolvedRecipe, checkpoint: Path | None, *, resume: str | bool) -> None:
    recipe, main = resolved.recipe, resolved.main
    args = main.args
    tokenizer = tokenizer_of(recipe, args)
    if resolved.sft is not None:
        folder = _sft_stage(resolved, resolved.sft, tokenizer, checkpoint)
        # Settings of where the starting policy is loaded from do not apply to the stage's folder.
        given = (args.model_init_kwargs or {}).items()
        how = {name: value for name, value in given if name not in WHERE_KWARGS}
        model = load_model(folder, how)
    else:
        model = policy_of(recipe, main, tokenizer)
    sources = sources_of(main, model, tokenizer)
    if resolved.contrast is not None:
        args.token_scores = scores_of_run(checkpoint) or str(
            score_stage(resolved.contrast, main, model, tokenizer, sources)
        )
    resume = resume if checkpoint is not None else False
    train_policy(main, model, tokenizer, sources=sources, ref_model=recipe.ref_model, resume=resume)


def _check_resumed(args: PairConfig, checkpoint: Path) -> None:
    """Refuse what can be refused before the stages that come first."""
    now = {"config": args.to_dict(), "processes": args.world_size}
    for name in ("template_date", "token_scores"):  # set during the run
        if now["config"].get(name) is None:
            del now["config"][name]
    check_same_settings(checkpoint, now, with_changes=args.resume_with_changes)


def adapter_of(resolved: ResolvedRecipe, stage: Stage) -> PeftConfig | dict[str, Any] | None:
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
        if name is not None and os.path.exists(name):
            base, _, adapters = chain_of(name)
            parts += [base, *(adapter.name for adapter in adapters)]
    return tuple(part for part in parts if os.path.exists(part))


def _sft_stage(
    resolved: ResolvedRecipe,
    stage: Stage,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Path | None,
) -> Path:
    """Run the SFT stage, or what is left of it, unless it has been run; returns its folder.

    By default the folder's name has a digest of everything the stage depends on, so that a changed
    stage gets a new folder and adapters trained on the old one keep their base.

    Args:
        checkpoint: the checkpoint from which the run itself will be resumed.
    """
    recipe, args = resolved.recipe, stage.args
    model = policy_of(recipe, stage, tokenizer)
    sources = sources_of(stage, model, tokenizer)
    key = stage_key(replace(stage, train_dataset=sources[0]), model, tokenizer)
    is_named = "output_dir" in (recipe.sft or {})
    folder = Path(args.output_dir if is_named else f"{args.output_dir}-{key[:8]}")
    args.output_dir = str(folder)
    # All processes must have looked before the first one changes the folder.
    is_finished = is_done(folder, key)
    args.distributed_state.wait_for_everyone()
    if is_finished:
        report(args, f"sft: {folder} has the same settings and data; using it")
        return folder
    if checkpoint is not None:
        _check_start(checkpoint, folder)
    _check_data(resolved.main, tokenizer)
    overwrite, inputs = recipe.overwrite or not is_named, _inputs(recipe)
    on_first_process(args, lambda: check_folder(folder, inputs))
    with output_held(args):
        if on_first_process(args, lambda: is_done(folder, key)):  # by another run, meanwhile
            return folder
        begun = on_first_process(
            args, lambda: begin_stage(folder, key, overwrite=overwrite, inputs=inputs)
        )
        train_policy(stage, model, tokenizer, sources=sources, resume=begun)
        if args.should_save:
            mark_done(folder, key)
        args.distributed_state.wait_for_everyone()
    return folder


def _check_start(checkpoint: Path, folder: Path) -> None:
    """Refuse to train a stage from which the resumed run did not start."""
    began = read_run_file(checkpoint, checkpoint.parent) or {}
    start = Path(str(began.get("model") or folder))
    if start.name != folder.name:
        raise TokenRatioError(
            f"the run of {checkpoint} started from {start}, and with its settings, model and data "
            f"of now the sft stage would make {folder}: restore them, or start a new run in "
            "another output_dir"
        )


def _check_data(stage: Stage, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse data of a later stage before an earlier one is trained."""
    for source, role in by_role(stage.args, stage.train_dataset, stage.eval_dataset):
        if not needs_policy(source):
            encode_source(source, tokenizer, stage.args, role=role)
