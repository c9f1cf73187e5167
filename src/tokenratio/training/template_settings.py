"""The settings of the chat template, and the day that it takes for today."""

import contextlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from tokenratio.data.template import TemplateSettings, depends_on_day, parse_day
from tokenratio.errors import TokenRatioError
from tokenratio.run_folder import read_run_file
from tokenratio.settings import option

_log = logging.getLogger(__name__)


@dataclass
class ChatTemplateSettings:
    """What a run tells the chat template, of policies and reward models alike."""

    chat_template: str | None = option(
        None, "Use this chat template in place of the tokenizer's: a file, or the template itself."
    )
    chat_template_kwargs: dict[str, Any] | str | None = option(
        None,
        "Arguments of the chat template, such as {enable_thinking: false}; a row's own "
        "take precedence.",
    )
    tools: list[Any] | None = option(None, "JSON schemas of tools, for rows without their own.")
    template_date: str | None = option(
        None, "The date that a chat template shows as today's. Default: the day the run starts."
    )

    def check_template_settings(self) -> None:
        """Raise `TokenRatioError` for a value outside its domain."""
        example = "{enable_thinking: false}"
        self.chat_template_kwargs = as_mapping(
            "chat_template_kwargs", self.chat_template_kwargs, example
        )
        if self.tools is not None:
            example = "{type: function, function: {name: ...}}"
            self.tools = [as_mapping("each of tools", tool, example) for tool in self.tools]
        if self.template_date is not None:
            self.template_date = parse_day(self.template_date).isoformat()

    @property
    def template(self) -> TemplateSettings:
        """The settings as the data are rendered with."""
        kwargs = self.chat_template_kwargs
        return TemplateSettings.of(
            kwargs if isinstance(kwargs, dict) else None, self.tools, self.template_date
        )


def as_mapping(name: str, value: Any, example: str) -> dict[str, Any] | None:
    """The mapping that a setting holds, itself or as JSON text; None if it is unset.

    Raises:
        TokenRatioError: it holds something else; the message has an example.
    """
    found = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            found = json.loads(value)
    if found is not None and not isinstance(found, Mapping):
        raise TokenRatioError(f"{name} must be a mapping such as {example}, not {value!r}")
    return None if found is None else dict(found)


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
    from tokenratio.training.token_contrast import TokenContrast

    return None if folder is None else TokenContrast.open(folder).template.get("template_date")
