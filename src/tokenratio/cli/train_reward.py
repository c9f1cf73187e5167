"""`tokenratio train-reward RECIPE.yaml`: trains a reward model on preference pairs."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenratio.cli.command import Command
from tokenratio.cli.declared import declared_fields
from tokenratio.cli.recipe import Recipe, Stage, read_values, without_null_output
from tokenratio.cli.training_headings import TRAINING_HEADINGS
from tokenratio.settings import Field, build, fields_of

if TYPE_CHECKING:
    from tokenratio.cli.stages import HeldOut
    from tokenratio.training.reward_trainer import RewardTrainer

USAGE = """usage: tokenratio train-reward RECIPE.yaml [--flag value ...]

Every setting can be a key of the recipe or a flag; flags take precedence. recipes/reward_*.yaml are
examples.
"""
# The keys that a reward model's recipe shares with a policy's; the help text where it differs.
_RECIPE_KEYS = {
    "model": "Model to start from, by name: a policy gets a new reward head.",
    "model_config": "A new model from a transformers config: {model_type: llama, ...}.",
    "tokenizer": None,
    "train_dataset": None,
    "eval_dataset": None,
    "overwrite": None,
}


def reward_fields() -> dict[str, Field]:
    """All keys of a recipe and flags of `train-reward`."""
    recipe = fields_of(Recipe)
    chosen = {
        name: recipe[name] if text is None else replace(recipe[name], help=text)
        for name, text in _RECIPE_KEYS.items()
    }
    return chosen | declared_fields("tokenratio.training.reward_trainer", "RewardConfig")


def train_reward(path: str, flags: dict[str, Any]) -> None:
    """Train what a recipe describes, save and evaluate it."""
    recipe, settings = read_values(path, flags, reward_fields(), _RECIPE_KEYS)
    from tokenratio.cli.folders import claimed_output
    from tokenratio.cli.recipe_models import reward_model_of, tokenizer_of
    from tokenratio.cli.stages import leave_together, resume_of, run_stage
    from tokenratio.cli.terminal import is_terminal, quiet_libraries, user_mistakes
    from tokenratio.training.arguments import check_machine
    from tokenratio.training.reward_trainer import RewardConfig, RewardTrainer
    from tokenratio.training.run_checks import check_settings

    quiet_libraries()
    folder = str(Path("runs") / Path(path).stem)
    defaults = {"output_dir": folder, "disable_tqdm": not is_terminal()}
    args = build(RewardConfig, defaults | without_null_output(settings), path)
    stage = Stage(args, recipe.train_dataset, recipe.eval_dataset)
    check_machine(args)
    check_settings(args, stage.eval_dataset)
    inputs, resume = (recipe.model,), resume_of(args)
    with claimed_output(
        args, overwrite=recipe.overwrite, inputs=inputs, resume=resume
    ) as checkpoint:
        resume = resume if checkpoint is not None else False
        tokenizer = tokenizer_of(recipe, args)
        model = reward_model_of(recipe, args, tokenizer)
        with user_mistakes("the run cannot be set up"):
            trainer = RewardTrainer(
                model, args, stage.train_dataset, stage.eval_dataset, processing_class=tokenizer
            )
        notes = [f"{sum(p.numel() for p in model.parameters()):,} parameters"]
        run_stage(
            trainer, stage, name="reward model", notes=notes, evaluate=_evaluate, resume=resume
        )
    leave_together(args)


def _evaluate(trainer: "RewardTrainer") -> "HeldOut":
    """Accuracy on the held-out pairs, compared with a rule that looks only at lengths."""
    import numpy as np

    from tokenratio.cli.progress import describe_accuracy
    from tokenratio.data.length_grouping import token_counts
    from tokenratio.evaluation.estimates import wilson_interval
    from tokenratio.evaluation.held_out_pairs import held_out_pairs

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
    line = (
        f"{describe_accuracy(accuracy.mean, interval, accuracy.num, scores.num_ties)}, "
        f"{rule.mean:+.3f} ± {rule.standard_error:.3f} (standard error) over "
        f"'the {scores.better_rule} one'; loss {output.metrics['eval_loss']:.4f}"
    )
    return output.metrics, {**asdict(scores), "interval": interval}, line


COMMAND = Command(
    USAGE, train_reward, argument="one recipe", fields=reward_fields, headings=TRAINING_HEADINGS
)
