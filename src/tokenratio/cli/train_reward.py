"""`tokenratio train-reward RECIPE.yaml`: a reward model from the pairs that a policy trains on."""

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

USAGE = """usage: tokenratio train-reward RECIPE.yaml [--field value ...]

A recipe's keys and the flags are the same; flags win. See recipes/reward_*.yaml for examples.
"""
# The keys a reward model's recipe shares with a policy's, with their help where it differs.
_RECIPE_KEYS = {
    "model": "Where the body's weights come from: a hub name or a folder, such as a policy's.",
    "model_config": "Or a model from a transformers config: {model_type: llama, ...}.",
    "tokenizer": None,
    "train_dataset": None,
    "eval_dataset": None,
    "overwrite": None,
}


def reward_fields() -> dict[str, Field]:
    """Every key a recipe or a flag of `train-reward` may name."""
    recipe = fields_of(Recipe)
    chosen = {
        name: recipe[name] if text is None else replace(recipe[name], help=text)
        for name, text in _RECIPE_KEYS.items()
    }
    return chosen | declared_fields("tokenratio.training.reward_trainer", "RewardConfig")


def run_recipe(path: str, flags: dict[str, Any]) -> None:
    """Read a recipe and train what it describes."""
    recipe, settings = read_values(path, flags, reward_fields(), _RECIPE_KEYS)
    from tokenratio.cli.terminal import is_terminal, quiet_libraries
    from tokenratio.training.reward_trainer import RewardConfig

    quiet_libraries()
    defaults = {
        "output_dir": str(Path("runs") / Path(path).stem),
        "disable_tqdm": not is_terminal(),
    }
    args = build(RewardConfig, defaults | without_null_output(settings), path)
    train_reward(Stage(args, recipe.train_dataset, recipe.eval_dataset), recipe)


def train_reward(stage: Stage, recipe: Recipe) -> dict[str, float]:
    """Train, save and evaluate; returns the held-out metrics."""
    from tokenratio.cli.folders import claim_output
    from tokenratio.cli.recipe_models import reward_model_of, tokenizer_of
    from tokenratio.cli.stages import leave_together, resume_of, run_stage
    from tokenratio.cli.terminal import user_mistakes
    from tokenratio.training.arguments import check_machine
    from tokenratio.training.reward_trainer import RewardTrainer
    from tokenratio.training.run_checks import check_settings

    args = stage.args
    check_machine(args)
    check_settings(args, stage.eval_dataset)
    if not resume_of(args):
        claim_output(args, overwrite=recipe.overwrite, inputs=(recipe.model,))
    tokenizer = tokenizer_of(recipe, args)
    model = reward_model_of(recipe, args, tokenizer)
    with user_mistakes("the run cannot be set up"):
        trainer = RewardTrainer(
            model, args, stage.train_dataset, stage.eval_dataset, processing_class=tokenizer
        )
    size = sum(p.numel() for p in model.parameters())
    notes = [f"{size:,} parameters"]
    metrics = run_stage(trainer, stage, name="reward model", notes=notes, evaluate=_evaluate)
    leave_together(args)
    return metrics


def _evaluate(trainer: "RewardTrainer") -> "HeldOut":
    """Accuracy on the held-out pairs, and beside it what a rule of length alone reaches."""
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
    USAGE,
    run_recipe,
    argument="one recipe",
    fields=reward_fields,
    headings=TRAINING_HEADINGS,
)
