"""The settings of the chat template, and the day that it takes for today."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from tokenratio.data.template import TemplateSettings, depends_on_day, parse_day
from tokenratio.errors import TokenRatioError
from tokenratio.training.run_folder import read_run_file

_log = logging.getLogger(__name__)


@dataclass
class ChatTemplateSettings:
    """What a run tells the chat template, of policies and reward models alike."""

    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "Use this chat template in place of the tokenizer's: a file, or the template "
            "itself."
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of the chat template, such as {enable_thinking: false}; a row's own "
            "take precedence."
        },
    )
    tools: list[Any] | None = field(
        default=None,
        metadata={"help": "JSON schemas of tools, for rows without their own."},
    )
    template_date: str | None = field(
        default=None,
        metadata={
            "help": "The date that a chat template shows as today's. Default: the day the run "
            "starts."
        },
    )

    def check_template_settings(self) -> None:
        """Raise `TokenRatioError` for a value outside its domain."""
        example = "{enable_thinking: false}"
        require_mapping("chat_template_kwargs", self.chat_template_kwargs, example)
        for tool in self.tools or []:
            require_mapping("each of tools", tool, "{type: function, function: {name: ...}}")
        if self.template_date is not None:
            self.template_date = parse_day(self.template_date).isoformat()

    @property
    def template(self) -> TemplateSettings:
        """The settings as the data are rendered with."""
        kwargs = self.chat_template_kwargs
        return TemplateSettings.of(
            kwargs if isinstance(kwargs, dict) else None, self.tools, self.template_date
        )


def require_mapping(name: str, value: Any, example: str) -> None:
    """Refuse a setting that is neither unset nor a mapping.

    Raises:
        TokenRatioError: with an example of one.
    """
    if value is not None and not isinstance(value, Mapping):
        raise TokenRatioError(f"{name} must be a mapping such as {example}, not {value!r}")


def fix_day(
    args: Any, tokenizer: PreTrainedTokenizerBase, *, token_scores: str | Path | None = None
) -> None:
    """Set `args.template_date` where the template writes the day, so that the run has one day.

    That of the run to be resumed, else of the token scores, else today; the same on all processes.

    Args:
        args: settings of a run, `ChatTemplateSettings` among them.
    """
    if args.template_date is not None or not depends_on_day(tokenizer, args.template):
        return
    day = _day_of_run(args) or _day_of_scores(token_scores) or args.template.day.isoformat()
    args.template_date = broadcast_object_list([day])[0]


def _day_of_run(args: Any) -> str | None:
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
    from tokenratio.training.token_scores import TokenScores

    return None if folder is None else TokenScores.open(folder).template.get("template_date")
