"""The day that a run's chat template shows as today."""

from pathlib import Path

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from tokenratio.data.template import depends_on_day
from tokenratio.run_folder import read_run_file
from tokenratio.training.pair_config import PairConfig
from tokenratio.training.token_contrast import TokenContrast


def fix_day(
    args: PairConfig, tokenizer: PreTrainedTokenizerBase, *, token_scores: str | Path | None = None
) -> None:
    """Set `args.template_date` if the template shows the date, so that the whole run has one.

    That of the run to be resumed, else of the token scores, else today; the same on all processes.
    """
    if args.template_date is not None or not depends_on_day(tokenizer, args.template):
        return
    day = _day_of_run(args) or _day_of_scores(token_scores) or args.template.day.isoformat()
    args.template_date = broadcast_object_list([day])[0]


def _day_of_run(args: PairConfig) -> str | None:
    resume = args.resume_from_checkpoint
    folder = Path(args.output_dir)
    if isinstance(resume, str) and resume.lower() not in ("true", "false"):
        folders = [Path(resume), Path(resume).parent]
    elif any(folder.glob("checkpoint-*")):
        folders = [folder]
    else:
        return None
    began = read_run_file(*folders)
    return None if began is None else began["config"].get("template_date")


def _day_of_scores(folder: str | Path | None) -> str | None:
    return None if folder is None else TokenContrast.open(folder).template.get("template_date")
