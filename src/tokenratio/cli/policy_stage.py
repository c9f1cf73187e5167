"""A stage that trains a policy."""

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenratio.cli.progress import describe_held_out, held_out_figures
from tokenratio.cli.recipe import Stage
from tokenratio.cli.run_stage import HeldOut, run_stage
from tokenratio.cli.terminal import user_mistakes
from tokenratio.training.memory import estimate_memory
from tokenratio.training.trainer import TokenRatioTrainer


def train_policy(
    stage: Stage,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sources: tuple[object, object],
    ref_model: str | None = None,
) -> tuple[TokenRatioTrainer, dict[str, float]]:
    """Train, save and evaluate; returns the trainer and the held-out metrics.

    Args:
        sources: the training and held-out data, as the trainer takes them.
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
    reference = trainer.reference
    notes = [] if reference is None else [f"reference: {reference.description}"]
    is_adapted = isinstance(trainer.model, PeftModel)
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    longest = trainer.train_data.longest
    estimate = estimate_memory(
        model.config,
        args,
        tokens_per_row=longest,
        trainable_parameters=trainable if is_adapted else None,
        reference_copy=ref_model is not None or not is_adapted,
    )
    notes.append(f"rows of up to {longest} tokens; {estimate.brief}")
    metrics = run_stage(trainer, stage, name=args.loss, notes=notes, evaluate=_evaluate)
    return trainer, metrics


def _evaluate(trainer: TokenRatioTrainer) -> HeldOut:
    metrics, num = trainer.evaluate(), len(trainer.eval_data.dataset)
    return metrics, held_out_figures(metrics, num), describe_held_out(metrics, num)
