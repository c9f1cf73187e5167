"""`tokenratio train-reward RECIPE.yaml`: a reward model from the pairs that a policy trains on."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenratio.cli.arguments import read_yaml
from tokenratio.cli.command import Command
from tokenratio.cli.declared import declared_fields
from tokenratio.cli.recipe import Recipe
from tokenratio.cli.training_headings import TRAINING_HEADINGS
from tokenratio.settings import Field, build, check_known, fields_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tokenratio.evaluation.held_out_pairs import PairScores
    from tokenratio.training.reward_trainer import RewardConfig, RewardTrainer

USAGE = """usage: tokenratio train-reward RECIPE.yaml [--field value ...]

A recipe's keys and the flags are the same; flags win. See recipes/reward_*.yaml for examples.
"""
# What a reward model has of a policy's recipe: no reference, no adapter, no stage before.
_RECIPE_KEYS = {
    "model": "Where the body's weights come from: a hub name or a folder, a policy's too.",
    "model_config": "Or a model from a transformers config: {model_type: llama, ...}.",
    "tokenizer": None,
    "train_dataset": None,
    "eval_dataset": None,
    "overwrite": None,
}


def run_recipe(path: str, flags: dict[str, Any]) -> None:
    """Train a reward model as a recipe says."""
    read_recipe(path, flags)  # mistakes are reported before torch is imported
    from tokenratio.cli.terminal import quiet_libraries

    quiet_libraries()
    train_reward(*resolve(path, flags))


def reward_fields() -> dict[str, Field]:
    """Every key a recipe or a flag of `train-reward` may name."""
    recipe = fields_of(Recipe)
    chosen = {
        name: recipe[name] if text is None else replace(recipe[name], help=text)
        for name, text in _RECIPE_KEYS.items()
    }
    return chosen | declared_fields("tokenratio.training.reward_trainer", "RewardConfig")


COMMAND = Command(
    USAGE,
    run_recipe,
    argument="one recipe",
    fields=reward_fields,
    headings=TRAINING_HEADINGS,
)


def read_recipe(path: str, flags: dict[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """A recipe, and the settings of its run as they are given; flags win.

    Raises:
        TokenRatioError: an unknown key, naming the nearest right one; a value that does not fit.
    """
    values = read_yaml(path)
    check_known(values, reward_fields(), f"key in {path}")
    values |= flags
    recipe = build(Recipe, {k: v for k, v in values.items() if k in _RECIPE_KEYS}, path)
    return recipe, {k: v for k, v in values.items() if k not in _RECIPE_KEYS}


def resolve(path: str, flags: dict[str, Any]) -> tuple[Recipe, "RewardConfig"]:
    """A recipe with every default filled in; see `read_recipe`."""
    from tokenratio.cli.terminal import is_terminal
    from tokenratio.training.reward_trainer import RewardConfig

    recipe, settings = read_recipe(path, flags)
    if settings.get("output_dir") is None:
        settings["output_dir"] = str(Path("runs") / Path(path).stem)
    return recipe, build(RewardConfig, {"disable_tqdm": not is_terminal(), **settings}, path)


def train_reward(recipe: Recipe, args: "RewardConfig") -> "PairScores | None":
    """Train, save, and measure on the held-out pairs, if there are any."""
    from tokenratio.cli.folders import claim_folder
    from tokenratio.cli.progress import use_terminal
    from tokenratio.cli.recipe_models import tokenizer_of
    from tokenratio.cli.terminal import training, user_mistakes
    from tokenratio.data import source_name
    from tokenratio.training.arguments import check_machine
    from tokenratio.training.reward_trainer import RewardTrainer
    from tokenratio.training.run_checks import check_settings

    check_machine(args)
    check_settings(args, recipe.eval_dataset)
    resume = args.resume_from_checkpoint
    if resume is not None and resume.lower() in ("true", "false"):
        resume = resume.lower() == "true"
    if not resume:
        with args.main_process_first():
            if args.should_save:
                folder = Path(args.output_dir)
                claim_folder(folder, overwrite=recipe.overwrite, inputs=(recipe.model,))
    tokenizer = tokenizer_of(recipe, args)
    model = _starting_model(recipe, args, tokenizer)
    with user_mistakes("the run cannot be set up"):
        trainer = RewardTrainer(
            model,
            args,
            recipe.train_dataset,
            recipe.eval_dataset,
            processing_class=tokenizer,
        )
    use_terminal(trainer)
    size = sum(p.numel() for p in model.parameters())
    _say(args, f"reward model of {size:,} parameters: {source_name(recipe.train_dataset)}")
    _say(args, trainer.train_data.summary())
    with training(trainer):
        result = trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
    _say(args, f"{result.global_step} steps, saved in {args.output_dir}")
    scores = None if trainer.eval_data is None else _held_out(trainer, args)
    # Or a process that ends first may be aborted by the threads of its process group.
    args.distributed_state.wait_for_everyone()
    args.distributed_state.destroy_process_group()
    return scores


def _starting_model(
    recipe: Recipe, args: "RewardConfig", tokenizer: "PreTrainedTokenizerBase"
) -> "PreTrainedModel":
    from tokenratio.cli.recipe_models import config_of
    from tokenratio.cli.terminal import user_mistakes
    from tokenratio.models.reward_model import build_reward_model, load_reward_model

    if recipe.model is not None:
        return load_reward_model(recipe.model, seed=args.seed, init_kwargs=args.model_init_kwargs)
    config = config_of(recipe, tokenizer)
    with user_mistakes("cannot build the model"):
        return build_reward_model(config, seed=args.seed)


def _held_out(trainer: "RewardTrainer", args: "RewardConfig") -> "PairScores":
    """Accuracy on the held-out pairs, printed and written to `eval.json`."""
    import numpy as np

    from tokenratio.cli.progress import describe_accuracy
    from tokenratio.data.length_grouping import token_counts
    from tokenratio.evaluation.estimates import wilson_interval
    from tokenratio.evaluation.held_out_pairs import held_out_pairs
    from tokenratio.run_folder import EVAL_FILE, replace_text

    dataset = trainer.eval_data.dataset
    output = trainer.predict(dataset, metric_key_prefix="eval")
    rewards = np.empty_like(output.predictions)
    rewards[output.label_ids] = output.predictions
    tokens = token_counts(dataset)
    scores = held_out_pairs(
        *rewards.T,
        tokens["chosen_ids"],
        tokens["rejected_ids"],
        prompts=[tuple(ids) for ids in dataset["prompt_ids"]],
    ).overall
    accuracy, rule = scores.accuracy, scores.over_length
    interval = wilson_interval(accuracy.mean, accuracy.num)
    if args.should_save:
        document = {**output.metrics, "held_out": {**asdict(scores), "interval": interval}}
        replace_text(Path(args.output_dir) / EVAL_FILE, json.dumps(document, indent=2) + "\n")
        trainer.create_model_card()
    _say(
        args,
        f"held out: {describe_accuracy(accuracy.mean, interval, accuracy.num, scores.num_ties)}, "
        f"{rule.mean:+.3f} ± {rule.standard_error:.3f} (standard error) over "
        f"'the {scores.better_rule} one'; loss {output.metrics['eval_loss']:.4f}",
    )
    return scores


def _say(args: "RewardConfig", text: str) -> None:
    if args.process_index == 0:
        print(text, flush=True)
