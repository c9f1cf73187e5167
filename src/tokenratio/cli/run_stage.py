"""One training run of a recipe, of a policy or a reward model: train, report, save, evaluate."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

from tokenratio.cli.progress import use_terminal
from tokenratio.cli.recipe import Stage
from tokenratio.cli.terminal import training
from tokenratio.data import PreparedData, source_name
from tokenratio.run_folder import EVAL_FILE, replace_text
from tokenratio.training.pair_config import PairConfig
from tokenratio.training.pair_trainer import PairTrainer

# Metrics of a trainer's held-out rows, the figures of them for eval.json, and both in a line.
HeldOut: TypeAlias = tuple[dict[str, float], dict[str, Any] | None, str]


def run_stage(
    trainer: PairTrainer,
    stage: Stage,
    *,
    name: str,
    notes: Iterable[str] = (),
    evaluate: Callable[[Any], HeldOut],
) -> dict[str, float]:
    """Train, save and evaluate; returns the held-out metrics, which `eval.json` holds too.

    Args:
        name: what is trained, for the lines printed.
        notes: more lines to print before training.
        evaluate: called with the trainer if there are held-out rows.
    """
    args, trained = stage.args, trainer.train_data
    assert trained is not None
    use_terminal(trainer)
    report(args, f"{name}: {source_name(stage.train_dataset)}")
    report(args, trained.summary())
    if isinstance(trainer.eval_data, PreparedData):
        report(args, f"evaluation:\n{trainer.eval_data.summary()}")
    for note in notes:
        report(args, note)
    with training(trainer):
        result = trainer.train(resume_from_checkpoint=resume_of(args))
        trainer.save_model()
    report(args, f"{name}: {result.global_step} steps, saved in {args.output_dir}")
    if trainer.eval_data is None:
        return {}
    metrics, figures, line = evaluate(trainer)
    if args.should_save:
        text = json.dumps({**metrics, "held_out": figures}, indent=2) + "\n"
        replace_text(Path(args.output_dir) / EVAL_FILE, text)
        trainer.create_model_card()
    report(args, f"held out: {line}")
    return metrics


def resume_of(args: PairConfig) -> str | bool:
    """`resume_from_checkpoint` as the trainer takes it: a folder, or whether to resume."""
    value = args.resume_from_checkpoint
    if value is None or value.lower() in ("true", "false"):
        return value is not None and value.lower() == "true"
    return value


def report(args: PairConfig, text: str) -> None:
    """Print on the first process."""
    if args.process_index == 0:
        print(text, flush=True)


def leave_together(args: PairConfig) -> None:
    """End the processes of a run at the same time.

    Otherwise one that ends first may be aborted by the threads of its process group.
    """
    args.distributed_state.wait_for_everyone()
    args.distributed_state.destroy_process_group()
