"""The stage before a run that needs token scores: trains the models that score, then scores."""

import copy
import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenratio.cli.recipe import TRAINED, Contrast, Stage
from tokenratio.cli.stages import (
    begin_stage,
    by_role,
    is_done,
    mark_done,
    report,
    stage_key,
    train_policy,
)
from tokenratio.data import PreparedData, padding_id, read_rows, source_digest
from tokenratio.data.columns import Columns
from tokenratio.data.contrast import PLACE, with_prompt_template
from tokenratio.data.template import TemplateSettings
from tokenratio.errors import TokenRatioError
from tokenratio.models.adapters import merge_adapters
from tokenratio.models.loading import load_merged, load_model
from tokenratio.models.pretrained_arguments import WHERE_KWARGS
from tokenratio.models.reference import model_digest
from tokenratio.run_folder import read_run_file
from tokenratio.training.checkpoints import checkpoints_of
from tokenratio.training.output_folder import on_first_process, output_held
from tokenratio.training.pair_config import encode_source
from tokenratio.training.reference_cache import CacheSettings
from tokenratio.training.token_contrast import (
    ContrastSide,
    TokenContrast,
    compute_contrast,
    summary,
)


def score_stage(
    contrast: Contrast,
    main: Stage,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: tuple[Any, Any],
) -> Path:
    """Train the models that the contrast needs and score all rows of the run; returns the folder.

    The folder's name has a digest of everything that the scores depend on, so that later runs can
    use them. `sources` are the run's training and held-out data.
    """
    args = main.args
    models: dict[str, PreTrainedModel] = {"reference": model}
    for name in (contrast.positive, contrast.negative):
        if name not in ("reference", *TRAINED):
            models[name] = load_model(name, args.model_init_kwargs)
    key = _key(contrast, main, models, tokenizer, sources)
    folder = Path(f"{contrast.dpo.args.output_dir}-{key[:8]}")
    is_finished = is_done(folder, key) and _can_be_read(folder)
    # All processes must have looked before the first one writes.
    args.distributed_state.wait_for_everyone()
    if is_finished:
        report(args, f"token scores: {folder} has the same settings and data; using it")
        return folder
    with output_held(args, folder):
        _compute(contrast, main, models, tokenizer, sources, folder, key)
    return folder


def _compute(
    contrast: Contrast,
    main: Stage,
    models: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    sources: tuple[Any, Any],
    folder: Path,
    key: str,
) -> None:
    args = main.args
    parts = [
        (source, role, encode_source(source, tokenizer, args, role=role))
        for source, role in by_role(args, *sources)
    ]
    pairs = parts[0][2]
    for name in TRAINED:
        if name in (contrast.positive, contrast.negative):
            data = pairs if name == "dpo" else _swapped(pairs)
            models[name] = _trained(
                contrast.dpo, folder / name, key, models["reference"], tokenizer, data
            )
    scores: TokenContrast | None = None
    compared = [
        (models[contrast.positive], contrast.positive_prompt),
        (models[contrast.negative], contrast.negative_prompt),
    ]
    settings = CacheSettings(
        root=args.reference_cache_dir,
        batch_size=args.per_device_eval_batch_size,
        device=args.device,
        padding_id=padding_id(tokenizer),
        autocast=torch.bfloat16 if args.bf16 else None,
        progress=not args.disable_tqdm,
    )
    for source, role, data in parts:
        how = {"split": args.split(role), "template": args.template, "columns": args.columns}
        sides = contrast_sides(data, source, tokenizer, compared, **how)
        new = compute_contrast(data, *sides, settings)
        scores = new if scores is None else scores.joined(new)
    assert scores is not None
    if args.should_save:
        scores.save(folder)
        mark_done(folder, key)
    args.distributed_state.wait_for_everyone()
    report(args, f"token scores: {summary(scores.values.values())}, in {folder}")


def scores_of_run(checkpoint: Path | None) -> str | None:
    """The folder of token scores that a run to be resumed began with; None if it has none."""
    if checkpoint is None:
        return None
    began = read_run_file(checkpoint, checkpoint.parent)
    # If the folder cannot be read, resuming reports it.
    return None if began is None else began["config"].get("token_scores")


def _can_be_read(folder: Path) -> bool:
    try:
        TokenContrast.open(folder)
    except TokenRatioError:
        return False
    return True


def contrast_sides(
    data: PreparedData,
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    compared: Iterable[tuple[PreTrainedModel, str]],
    *,
    split: str | None,
    template: TemplateSettings | None,
    columns: Columns | None,
) -> list[ContrastSide]:
    """Each model with the data after its prompt; the settings are those that `data` has."""
    sides = []
    for model, prompt in compared:
        after = data
        if prompt != PLACE:
            after = with_prompt_template(
                data, source, tokenizer, prompt, split=split, settings=template, columns=columns
            )
        sides.append(ContrastSide(model, after, prompt))
    return sides


def _swapped(data: PreparedData) -> PreparedData:
    """The pairs with chosen and rejected exchanged."""
    names = {"chosen_ids": "rejected_ids", "rejected_ids": "chosen_ids"}
    return replace(data, dataset=data.dataset.rename_columns(names))


def _trained(
    stage: Stage,
    folder: Path,
    key: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
) -> PreTrainedModel:
    """A copy of the starting policy after DPO on these pairs, on the CPU.

    One that an interrupted stage with the same key has trained is loaded, or trained further.
    """
    stage = replace(stage, args=copy.copy(stage.args))
    args = stage.args
    args.output_dir = str(folder)
    if on_first_process(args, lambda: is_done(folder, key)):
        report(args, f"{folder} has been trained; using it")
        given = (args.model_init_kwargs or {}).items()
        how = {name: value for name, value in given if name not in WHERE_KWARGS}
        return load_merged(folder, how) or load_model(folder, how)
    report(args, f"training a model to score tokens with: {folder.name}")
    begun = on_first_process(args, lambda: begin_stage(folder, key, overwrite=True))
    trainer = train_policy(
        stage, copy.deepcopy(model), tokenizer, sources=(data, None), resume=begun
    )
    if args.should_save:
        mark_done(folder, key)
        for checkpoint in checkpoints_of(folder):
            shutil.rmtree(checkpoint)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    policy = merge_adapters(policy) if isinstance(policy, PeftModel) else policy
    # The next model then has the device to itself.
    policy = policy.to("cpu")
    trainer.accelerator.free_memory()
    return policy


def _key(
    contrast: Contrast,
    main: Stage,
    models: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    sources: tuple[Any, Any],
) -> str:
    """Digest of everything that the scores depend on, by content."""
    args = main.args
    document = {
        "dpo": stage_key(
            replace(contrast.dpo, train_dataset=sources[0]), models["reference"], tokenizer
        ),
        "models": {name: model_digest(model) for name, model in models.items()},
        "data": [
            (role, source_digest(read_rows(source, split=args.split(role))))
            for source, role in by_role(args, *sources)
        ],
        "columns": args.columns,
        "selection": [asdict(args.selection(role)) for role in ("train", "eval")],
        "limits": [args.max_length, args.max_prompt_length, args.bf16],
        "contrast": [
            *(contrast.positive, contrast.negative),
            *(contrast.positive_prompt, contrast.negative_prompt),
        ],
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
