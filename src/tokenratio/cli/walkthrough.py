"""What `quickstart` and `demo` share: their own folder, training, and a short table."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenratio.errors import TokenRatioError
from tokenratio.settings import check_known

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tokenratio.evaluation.options import EvaluateOptions
    from tokenratio.evaluation.results import PolicyMeasures

_STEPS_PER_LINE = 20
PAIRS_FILE, EVALUATION, TABLE_FILE = "pairs.jsonl", "evaluation", "table.md"
REPORT_FILE, CREDIT_FILE = "report.html", "credit.html"
# Pairs in the page about tokens: enough to look around, read in seconds.
_NUM_INSPECTED = 12


def check_loss(loss: str) -> None:
    """Refuse a loss that is unknown, trains on no pairs, or needs models that score tokens."""
    from tokenratio.losses import LOSSES, METHODS

    if loss in METHODS and (loss not in LOSSES or LOSSES[loss].needs_contrast):
        why = "needs models that score tokens" if loss in LOSSES else "does not train on pairs"
        raise TokenRatioError(
            f"loss {loss} {why}: train it with a recipe, such as recipes/methods/{loss}.yaml"
        )
    known = [name for name, method in LOSSES.items() if not method.needs_contrast]
    check_known([loss], known, "loss", listed="`tokenratio methods` describes them")


def check_seed(seed: int) -> None:
    """Refuse a seed that numpy does not take."""
    if not 0 <= seed < 2**32:
        raise TokenRatioError(f"seed must lie between 0 and 2^32 - 1, not {seed}")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a command's folder, which need not exist.

    Raises:
        TokenRatioError: another process is using it, or it cannot be a folder.
    """
    from tokenratio.locks import held

    first = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not first.is_dir():
        raise TokenRatioError(f"output_dir {folder}: {first} is a file")
    with held(folder):
        yield


def claim(
    folder: Path, command: str, options: Any, *, written: Iterable[str], model: str | None = None
) -> None:
    """Make the folder of a command, instead of the one it left there before; it holds it alone.

    Args:
        written: what the command writes besides the folder of a loss and what every one writes.
        model: the name of the model to start from.
    Raises:
        TokenRatioError: the folder holds anything else, or the model.
    """
    from tokenratio.locks import LOCK_FILE
    from tokenratio.losses import LOSSES
    from tokenratio.run_folder import replace_text

    mark = folder / f"{command}.json"  # only a folder that holds this file may be replaced
    start = Path(model or "").resolve()
    if model is not None and start.exists() and folder.resolve() in (start, *start.parents):
        raise TokenRatioError(
            f"{model} is in {folder}, which {command} replaces: choose another --output_dir"
        )
    found = [path for path in folder.glob("*") if path.name != LOCK_FILE]
    pages = (REPORT_FILE, CREDIT_FILE)
    ours = {mark.name, PAIRS_FILE, EVALUATION, TABLE_FILE, *pages, *written, *LOSSES}
    for path in found:
        if path.name not in ours or not mark.is_file():
            raise TokenRatioError(
                f"{folder} holds {path.name}, which {command} did not write: choose another "
                "--output_dir"
            )
    # The mark goes last: what an interruption leaves is still ours.
    for path in sorted(found, key=lambda path: path == mark):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    replace_text(mark, json.dumps(asdict(options), indent=2) + "\n")


def write_pairs(folder: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write preference pairs; returns the file."""
    from tokenratio.run_folder import replace_text

    path = folder / PAIRS_FILE
    replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train_step(
    policy: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    data: Any,
    *,
    peft_config: "PeftConfig | None" = None,
    **settings: Any,
) -> None:
    """Train and save; steps differ by these settings."""
    from tokenratio.cli.progress import use_terminal
    from tokenratio.cli.terminal import is_terminal
    from tokenratio.training.config import TokenRatioConfig
    from tokenratio.training.trainer import TokenRatioTrainer

    args = TokenRatioConfig(save_strategy="no", disable_tqdm=not is_terminal(), **settings)
    trainer = TokenRatioTrainer(
        policy, args=args, train_dataset=data, processing_class=tokenizer, peft_config=peft_config
    )
    use_terminal(trainer, every=_STEPS_PER_LINE)
    trainer.train()
    trainer.save_model()


def evaluate_step(
    folder: Path, loss: str, options: "EvaluateOptions", *, shown: Sequence[str]
) -> list["PolicyMeasures"]:
    """Evaluate a policy and its reference, write the short table and print it.

    Args:
        options: of `evaluate`; the policy is in the folder of its loss.
        shown: the measures in the table.
    """
    from tokenratio.cli.terminal import is_terminal
    from tokenratio.evaluation import evaluate
    from tokenratio.evaluation.results import table
    from tokenratio.run_folder import replace_text

    notes: list[str] = []
    policies = evaluate(
        [f"{loss}={folder / loss}"],
        options,
        report=lambda line: notes.append(line) if "ALARM" in line or "WATCH" in line else None,
        progress=is_terminal(),
    )
    text = table(
        [
            replace(policy, measures=tuple(filter(None, map(policy.named, shown))))
            for policy in policies
        ]
    )
    text += "".join(f"\n\n{note}" for note in notes)
    replace_text(folder / TABLE_FILE, text + "\n")
    print(text)
    return policies


def report_step(folder: Path, loss: str) -> None:
    """Write the page about the aligned policy and print its path."""
    from tokenratio.report.run_report import write_report

    try:
        path = write_report([folder / loss], folder / REPORT_FILE)
    except TokenRatioError as error:  # nothing else is lost without it
        print(f"no report: {error}")
    else:
        print(f"report: {path}")


def credit_step(folder: Path, loss: str, **options: Any) -> None:
    """Write the page about the tokens of a few pairs, under the aligned policy, and print its path.

    Args:
        options: of `inspect`; the policy is in the folder of its loss.
    """
    from tokenratio.report.credit import inspect_pairs
    from tokenratio.report.credit_options import InspectOptions
    from tokenratio.report.credit_page import write_credit_page

    page = folder / CREDIT_FILE
    settings = InspectOptions(num_pairs=_NUM_INSPECTED, **options)
    try:
        found = inspect_pairs([f"{loss}={folder / loss}"], settings, report=lambda line: None)
        write_credit_page(found, page)
    except TokenRatioError as error:  # nothing else is lost without it
        print(f"no page about tokens: {error}")
    else:
        print(f"pairs token by token: {page}")
