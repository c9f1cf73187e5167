"""Stages of a recipe: training one, and finding one that need not be run again."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenratio.cli.folders import claim_folder
from tokenratio.cli.progress import describe_held_out, held_out_figures, use_terminal
from tokenratio.cli.recipe import Stage
from tokenratio.cli.terminal import training, user_mistakes
from tokenratio.data import PreparedData, locate, source_digest, source_name
from tokenratio.data.prepared_cache import tokenizer_digest
from tokenratio.masking import mask_text
from tokenratio.models.device import describe_training
from tokenratio.models.reference import model_digest
from tokenratio.models.token_requests import language_model
from tokenratio.run_folder import EVAL_FILE, STAGE_FILE, read_document, replace_text
from tokenratio.training.checkpoints import last_checkpoint
from tokenratio.training.memory import AdapterShapes, estimate_memory
from tokenratio.training.pair_config import PairConfig, Role
from tokenratio.training.pair_trainer import PairTrainer
from tokenratio.training.trainer import TokenRatioTrainer

# Held-out metrics, the figures among them for eval.json, and a line that describes them.
HeldOut: TypeAlias = tuple[dict[str, float], dict[str, Any] | None, str]
_BEGUN, _DONE = "begun", "done"
# Settings that do not change the weights a stage ends with.
_NOT_IN_KEY = (
    *("output_dir", "run_name", "logging_dir", "disable_tqdm", "resume_from_checkpoint"),
    *("data_cache_dir", "dataset_num_proc", "resume_with_changes"),
)


def train_policy(
    stage: Stage,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sources: tuple[object, object],
    ref_model: str | None = None,
    resume: str | bool = False,
) -> TokenRatioTrainer:
    """Train, save and evaluate; returns the trainer.

    Args:
        sources: the training and held-out data, as the trainer takes them.
        resume: as the trainer takes it.
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
    layers = model.config.get_text_config().num_hidden_layers
    longest = trainer.train_data.longest
    estimate = estimate_memory(
        model.config,
        args,
        tokens_per_row=longest,
        adapter=AdapterShapes.of(trainer.model, layers) if is_adapted else None,
        reference_copy=ref_model is not None or not is_adapted,
    )
    notes.append(f"rows of up to {longest} tokens; {estimate.brief}")
    run_stage(trainer, stage, name=args.loss, notes=notes, evaluate=_evaluate, resume=resume)
    return trainer


def _evaluate(trainer: TokenRatioTrainer) -> HeldOut:
    metrics, num = trainer.evaluate(), len(trainer.eval_data.dataset)
    return metrics, held_out_figures(metrics, num), describe_held_out(metrics, num)


def run_stage(
    trainer: PairTrainer,
    stage: Stage,
    *,
    name: str,
    notes: Iterable[str],
    evaluate: Callable[[Any], HeldOut],
    resume: str | bool,
) -> None:
    """Train, save and evaluate; the held-out metrics are printed and written to `eval.json`.

    Args:
        name: what is trained, for the printed lines.
        notes: more lines to print before training.
        evaluate: called with the trainer if there are held-out rows.
        resume: as the trainer takes it.
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
    weights = language_model(trainer.model).dtype
    report(args, f"device: {describe_training(args.device, weights, args.autocast_dtype)}")
    with training(trainer):
        result = trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
    report(args, f"{name}: {result.global_step} steps, saved in {args.output_dir}")
    if trainer.eval_data is None:
        return
    metrics, figures, line = evaluate(trainer)
    if args.should_save:
        text = json.dumps({**metrics, "held_out": figures}, indent=2) + "\n"
        replace_text(Path(args.output_dir) / EVAL_FILE, text)
        trainer.create_model_card()
    report(args, f"held out: {line}")


def by_role(args: Any, train: Any, held_out: Any) -> list[tuple[Any, Role]]:
    """The sources that a run reads, with their roles, as its trainer reads them."""
    roles: list[tuple[Any, Role]] = [(train, "train"), args.evaluated(train, held_out)]
    return [(source, role) for source, role in roles if source is not None]


def resume_of(args: PairConfig) -> str | bool:
    """`resume_from_checkpoint` as the trainer takes it: a folder, or whether to resume."""
    value = args.resume_from_checkpoint or "false"
    return {"true": True, "false": False}.get(value.lower(), value)


def report(args: PairConfig, text: str) -> None:
    """Print on the first process."""
    if args.process_index == 0:
        print(mask_text(text), flush=True)


def leave_together(args: PairConfig) -> None:
    """End the processes of a run together; one that ends first may be aborted by gloo's threads."""
    args.distributed_state.wait_for_everyone()
    args.distributed_state.destroy_process_group()


def stage_key(stage: Stage, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what a stage depends on, by content; one with the same key need not be rerun."""
    left_out = set(_NOT_IN_KEY)
    if not stage.args.load_best_model_at_end:
        left_out |= {"save_strategy", "save_steps", "save_total_limit"}
    document = {
        "model": model_digest(model),
        "config": model.config.to_dict(),
        "tokenizer": tokenizer_digest(tokenizer),
        "adapter": stage.peft,
        "settings": {k: v for k, v in stage.args.to_dict().items() if k not in left_out},
        "data": [
            (part.weight, source_digest(part.rows()))
            for part in locate(stage.train_dataset, split=stage.args.split("train"), prefer="sft")
        ],
    }
    text = json.dumps(document, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def is_done(folder: Path, key: str) -> bool:
    """Whether the folder holds a finished stage with that key."""
    return _state(folder, key) == _DONE


def begin_stage(folder: Path, key: str, *, overwrite: bool, inputs: Sequence[str] = ()) -> bool:
    """Whether to resume an interrupted stage with that key; if not, the folder is cleared.

    Args:
        overwrite: remove another run or stage that the folder holds.
        inputs: models that the stage starts from.
    """
    is_same = _state(folder, key) == _BEGUN
    if is_same and last_checkpoint(folder, digests=False) is not None:
        return True
    claim_folder(folder, overwrite=overwrite or is_same, inputs=inputs)
    _mark(folder, key, _BEGUN)
    return False


def mark_done(folder: Path, key: str) -> None:
    """Record that the folder's stage is finished."""
    _mark(folder, key, _DONE)


def _mark(folder: Path, key: str, state: str) -> None:
    replace_text(folder / STAGE_FILE, json.dumps({"key": key, "state": state}) + "\n")


def _state(folder: Path, key: str) -> str | None:
    """How far the folder's stage is; None if it holds none with that key."""
    found = read_document(folder / STAGE_FILE) or {}
    return found.get("state", _DONE) if found.get("key") == key else None
