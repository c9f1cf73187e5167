"""The flags of commands that render conversations, and what they take over from a run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenratio.settings import option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tokenratio.data.template import TemplateSettings

TEMPLATE_FLAGS = ("chat_template", "chat_template_kwargs", "tools", "template_date")


@dataclass(frozen=True)
class TemplateOptions:
    """What the chat template is told. Unset, a run's folder says what the run was trained with."""

    chat_template: str | None = option(
        None, "Chat template to use instead of the tokenizer's: a file, or the template itself."
    )
    chat_template_kwargs: dict[str, Any] | None = option(
        None,
        "Arguments of the chat template, such as '{enable_thinking: false}'; a row's "
        "own take precedence. Default: those the run was trained with.",
    )
    tools: list[Any] | None = option(
        None, "JSON schemas of tools, for rows without their own. Default: the run's."
    )
    template_date: str | None = option(
        None,
        "The date that a template shows as today's. Default: that of the run, or of "
        "the output being resumed; otherwise today's.",
    )


def template_of(
    options: TemplateOptions | Any,
    tokenizer: "PreTrainedTokenizerBase",
    model: str | None,
    *,
    day: str | None = None,
    report: Callable[[str], None] = print,
) -> tuple["PreTrainedTokenizerBase", "TemplateSettings"]:
    """The tokenizer with its chat template, and what that is told.

    Args:
        options: an object with the fields of `TemplateOptions`.
        model: whose folder may say what a run was trained with.
        day: of an output that is resumed; it wins over the run's.
        report: where it is said what is taken over from the run.
    Raises:
        TokenRatioError: the template cannot be read, or a date is none.
    """
    from tokenratio.data.template import TemplateSettings, with_chat_template
    from tokenratio.run_folder import read_run_file

    began = None if model is None else read_run_file(model)
    config = {} if began is None else began["config"]
    given = {name: getattr(options, name) for name in TEMPLATE_FLAGS[1:]}
    taken = {name: config.get(name) for name, value in given.items() if value is None}
    taken = {name: value for name, value in taken.items() if value}
    if given["template_date"] is None and day is not None:
        taken["template_date"] = day
    settings = TemplateSettings.of(**{**given, **taken})
    tokenizer = with_chat_template(tokenizer, options.chat_template)
    told = {name: value for name, value in settings.record(tokenizer).items() if name in taken}
    if told and began is not None:
        listed = ", ".join(f"{name} {value}" for name, value in told.items())
        report(f"{model}: rendered as it was trained: {listed}")
    return tokenizer, settings
