"""One training run of a recipe: its data, its trainer, what is said of it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenratio.cli.progress import describe_held_out, held_out_figures, use_terminal
from tokenratio.cli.recipe import Stage
from tokenratio.cli.terminal import training, user_mistakes
from tokenratio.data import PreparedData, locate, source_digest, source_name
from tokenratio.data.prepared_cache import tokenizer_digest
from tokenratio.data.sources import draw_worlds
from tokenratio.models.generation import policy_sampler
from tokenratio.models.reference import model_digest
from tokenratio.run_folder import EVAL_FILE, replace_text
from tokenratio.training.arguments import check_machine
from tokenratio.training.memory import estimate_memory
from tokenratio.training.run_checks import check_settings
from tokenratio.training.trainer import TokenRatioTrainer

# What does not change the weights a stage ends with.
_NOT_IN_KEY = (
    *("output_dir", "run_name", "logging_dir", "disable_tqdm", "resume_from_checkpoint"),
    *("data_cache_dir", "dataset_num_proc"),
)
_LONGEST_WORLD_RESPONSE = 64


def check_stages(*stages: Stage, dry: bool) -> None:
    """Find settings of any stage that would fail, before the first of them begins.

    Args:
        dry: whether nothing will be run, so that this machine need not be able to.
    Raises:
        TokenRatioError: which setting, and what to do.
    """
    for stage in stages:
        if not dry:
            check_machine(stage.args)
        check_settings(stage.args, stage.eval_dataset)


def stage_key(stage: Stage, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what a stage depends on, by content: an equal one need not be run again."""
    document = {
        "model": model_digest(model),
        "config": model.config.to_dict(),
        "tokenizer": tokenizer_digest(tokenizer),
        "adapter": stage.peft,
        "settings": {k: v for k, v in stage.args.to_dict().items() if k not in _NOT_IN_KEY},
        "data": [
            (part.weight, source_digest(part.rows()))
            for part in locate(stage.train_dataset, split=stage.args.split("train"), prefer="sft")
        ],
    }
    text = json.dumps(document, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def sources_of(
    stage: Stage, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Any, Any]:
    """The stage's data, for training and held out; a world's pairs are drawn from the policy."""
    sampler = policy_sampler(
        model, tokenizer, max_new_tokens=_LONGEST_WORLD_RESPONSE, seed=stage.args.seed
    )
    return draw_worlds(stage.train_dataset, sampler), draw_worlds(stage.eval_dataset, sampler)


def run_stage(
    stage: Stage,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sources: tuple[Any, Any],
    ref_model: str | None = None,
) -> tuple[TokenRatioTrainer, dict[str, float]]:
    """Train, save and evaluate; returns the trainer and the held-out metrics.

    Args:
        sources: of `sources_of`, or as the trainer takes them.
    """
    args = stage.args
    with user_mistakes("the run cannot be set up"):
        trainer = TokenRatioTrainer(
            model,
            ref_model=ref_model,
            args=args,
            train_dataset=sources[0],
            eval_dataset=sources[1],
            processing_class=tokenizer,
            peft_config=stage.peft,
        )
    use_terminal(trainer)
    say(stage, f"{args.loss}: {source_name(stage.train_dataset)}")
    say(stage, trainer.train_data.summary())
    if isinstance(trainer.eval_data, PreparedData):
        say(stage, f"evaluation:\n{trainer.eval_data.summary()}")
    if trainer.reference is not None:
        say(stage, f"reference: {trainer.reference.description}")
    is_adapted = isinstance(trainer.model, PeftModel)
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    estimate = estimate_memory(
        model.config,
        args,
        tokens_per_row=trainer.train_data.longest,
        trainable_parameters=trainable if is_adapted else None,
        reference_copy=ref_model is not None or not is_adapted,
    )
    say(stage, f"rows of up to {trainer.train_data.longest} tokens; {estimate.brief}")
    with training(trainer):
        result = trainer.train(resume_from_checkpoint=resume_of(args.resume_from_checkpoint))
        trainer.save_model()
    say(stage, f"{args.loss}: {result.global_step} steps, saved in {args.output_dir}")
    if trainer.eval_data is None:
        return trainer, {}
    metrics = trainer.evaluate()
    num = len(trainer.eval_data.dataset)
    if args.should_save:
        document = {**metrics, "held_out": held_out_figures(metrics, num)}
        replace_text(Path(args.output_dir) / EVAL_FILE, json.dumps(document, indent=2) + "\n")
        trainer.create_model_card()
    say(stage, f"held out: {describe_held_out(metrics, num)}")
    return trainer, metrics


def resume_of(value: str | None) -> str | bool | None:
    """`resume_from_checkpoint` as the trainer takes it: a folder, or whether to."""
    if value is None or value.lower() in ("true", "false"):
        return value is not None and value.lower() == "true"
    return value


def say(stage: Stage, text: str) -> None:
    """Print on the first process."""
    if stage.args.process_index == 0:
        print(text, flush=True)
