"""The stage before a run that needs the contrast of its tokens: models for it, then the scores."""

import copy
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenratio.cli.folders import claim_output
from tokenratio.cli.recipe import TRAINED, Contrast, Stage
from tokenratio.cli.stages import is_done, mark_done, report, stage_key, train_policy
from tokenratio.data import (
    PreparedData,
    padding_id,
    read_rows,
    source_digest,
)
from tokenratio.data.contrast import PLACE, with_prompt_template
from tokenratio.errors import TokenRatioError
from tokenratio.models.adapters import merge_adapters
from tokenratio.models.loading import load_model
from tokenratio.models.reference import model_digest
from tokenratio.run_folder import read_run_file
from tokenratio.training.config import TokenRatioConfig
from tokenratio.training.data_settings import Role, encode_source
from tokenratio.training.token_contrast import (
    ContrastSide,
    TokenContrast,
    compute_contrast,
    summary,
)


@dataclass(frozen=True)
class _Part:
    """One source of the run, training or held out."""

    source: Any
    role: Role
    data: PreparedData


def score_stage(
    contrast: Contrast,
    main: Stage,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: tuple[Any, Any],
) -> Path:
    """Train the models that the contrast needs, score all rows of the run, return the folder.

    The folder's name holds a digest of all it depends on, so it is used again and never wrongly.

    Args:
        sources: the run's data, for training and held out.
    Raises:
        TokenRatioError: a model cannot be loaded or read the rows; the run is to use FSDP.
    """
    if main.args.fsdp:
        raise TokenRatioError(
            "a section score_tokens trains and runs whole models, which FSDP splits: compute the "
            "scores with `tokenratio score-tokens` first and name them in token_scores"
        )
    models: dict[str, PreTrainedModel] = {"reference": model}
    for name in (contrast.positive, contrast.negative):
        if name not in ("reference", *TRAINED):
            models[name] = load_model(name, main.args.model_init_kwargs)
    key = _key(contrast, main, models, tokenizer, sources)
    folder = Path(f"{contrast.dpo.args.output_dir}-{key[:8]}")
    if is_done(folder, key) and _can_be_read(folder):
        report(main.args, f"token scores: {folder} has the same settings and data; using it")
        return folder
    # All processes have looked before the first one writes.
    main.args.distributed_state.wait_for_everyone()
    parts = [
        _Part(source, role, encode_source(source, tokenizer, main.args, role=role))
        for source, role in _by_role(main, sources)
    ]
    pairs = parts[0].data
    for name, data in zip(TRAINED, (pairs, _swapped(pairs)), strict=True):
        if name in (contrast.positive, contrast.negative):
            stage = _stage_in(contrast.dpo, folder / name)
            models[name] = _trained(stage, model, tokenizer, data)
    scores: TokenContrast | None = None
    for part in parts:
        sides = [
            ContrastSide(models[name], _prompted(part, tokenizer, prompt, main.args), prompt)
            for name, prompt in (
                (contrast.positive, contrast.positive_prompt),
                (contrast.negative, contrast.negative_prompt),
            )
        ]
        new = compute_contrast(
            part.data,
            *sides,
            root=main.args.reference_cache_dir,
            batch_size=main.args.per_device_eval_batch_size,
            device=main.args.device,
            padding_id=padding_id(tokenizer),
            autocast=torch.bfloat16 if main.args.bf16 else None,
            progress=not main.args.disable_tqdm,
        )
        scores = new if scores is None else scores.joined(new)
    assert scores is not None
    if main.args.should_save:
        scores.save(folder)
        mark_done(folder, key)
    main.args.distributed_state.wait_for_everyone()
    report(main.args, f"token scores: {summary(scores.values.values())}, in {folder}")
    return folder


def scores_of_run(resume: str | bool | None, output_dir: str) -> str | None:
    """The token scores that a run to be resumed began with; None if it has none."""
    if not resume:
        return None
    began = read_run_file(*([output_dir] if resume is True else [resume, Path(resume).parent]))
    # Resuming reports what is wrong with the folder.
    return None if began is None else began["config"].get("token_scores")


def _can_be_read(folder: Path) -> bool:
    try:
        TokenContrast.open(folder)
    except TokenRatioError:
        return False
    return True


def _by_role(main: Stage, sources: tuple[Any, Any]) -> list[tuple[Any, Role]]:
    """The sources that the run reads, as its trainer does."""
    roles: list[tuple[Any, Role]] = [(sources[0], "train"), main.args.evaluated(*sources)]
    return [(source, role) for source, role in roles if source is not None]


def _swapped(data: PreparedData) -> PreparedData:
    """The pairs with chosen and rejected in each other's place."""
    names = {"chosen_ids": "rejected_ids", "rejected_ids": "chosen_ids"}
    return replace(data, dataset=data.dataset.rename_columns(names))


def _stage_in(stage: Stage, folder: Path) -> Stage:
    args = copy.copy(stage.args)
    args.output_dir = str(folder)
    return replace(stage, args=args)


def _trained(
    stage: Stage,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
) -> PreTrainedModel:
    """A copy of the starting policy after DPO on these pairs."""
    report(stage.args, f"training a model to score tokens with: {Path(stage.args.output_dir).name}")
    claim_output(stage.args, overwrite=True, inputs=())
    trainer, _ = train_policy(stage, copy.deepcopy(model), tokenizer, sources=(data, None))
    policy = trainer.accelerator.unwrap_model(trainer.model)
    policy = merge_adapters(policy) if isinstance(policy, PeftModel) else policy
    # The next model is trained with the device to itself.
    policy = policy.to("cpu")
    trainer.accelerator.free_memory()
    return policy


def _prompted(
    part: _Part, tokenizer: PreTrainedTokenizerBase, prompt: str, args: TokenRatioConfig
) -> PreparedData:
    if prompt == PLACE:
        return part.data
    return with_prompt_template(
        part.data,
        part.source,
        tokenizer,
        prompt,
        split=args.split(part.role),
        settings=args.template,
        columns=args.columns,
    )


def _key(
    contrast: Contrast,
    main: Stage,
    models: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    sources: tuple[Any, Any],
) -> str:
    """Digest of all that the scores depend on, by content."""
    document = {
        "dpo": stage_key(contrast.dpo, models["reference"], tokenizer),
        "models": {name: model_digest(model) for name, model in models.items()},
        "data": [
            (role, source_digest(read_rows(source, split=main.args.split(role))))
            for source, role in _by_role(main, sources)
        ],
        "columns": main.args.columns,
        "selection": [asdict(main.args.selection(role)) for role in ("train", "eval")],
        "limits": [main.args.max_length, main.args.max_prompt_length, main.args.bf16],
        "contrast": [
            *(contrast.positive, contrast.negative),
            *(contrast.positive_prompt, contrast.negative_prompt),
        ],
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
