"""The settings of chat templates, and those that commands take from a run."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenratio.errors import TokenRatioError
from tokenratio.masking import shown_value
from tokenratio.records import parse_json
from tokenratio.settings import option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tokenratio.data.template import TemplateSettings

TEMPLATE_FLAGS = ("chat_template", "chat_template_kwargs", "tools", "template_date")


@dataclass
class TemplateOptions:
    """Settings of the chat template, for training and every command that renders.

    Not frozen, because trainers' settings also inherit from transformers' `TrainingArguments`.
    """

    chat_template: str | None = option(
        None, "Chat template to use instead of the tokenizer's: a file, or the template itself."
    )
    chat_template_kwargs: dict[str, Any] | str | None = option(
        None,
        "Arguments of the chat template, such as '{enable_thinking: false}'; those of a row take "
        "precedence. Default for a trained model: those of its run.",
    )
    tools: list[Any] | None = option(
        None,
        "JSON schemas of tools, for rows without any. Default for a trained model: those of its "
        "run.",
    )
    template_date: str | None = option(
        None,
        "The date that a chat template shows as today's. Default: the one recorded in the run or "
        "output being resumed or read, otherwise today.",
    )

    def check_template_settings(self) -> None:
        """Read settings given as text; raise `TokenRatioError` for an invalid one."""
        from tokenratio.data.template import parse_day, reserved_argument

        example = "{enable_thinking: false}"
        kwargs = as_mapping("chat_template_kwargs", self.chat_template_kwargs, example)
        self.chat_template_kwargs = kwargs
        if reason := reserved_argument(kwargs or {}):
            raise TokenRatioError(reason)
        if self.tools is not None:
            example = "{type: function, function: {name: ...}}"
            self.tools = [as_mapping("each of tools", tool, example) for tool in self.tools]
        if self.template_date is not None:
            self.template_date = parse_day(self.template_date).isoformat()

    @property
    def template(self) -> "TemplateSettings":
        """The settings that the data are rendered with."""
        from tokenratio.data.template import TemplateSettings

        kwargs = self.chat_template_kwargs
        return TemplateSettings.of(
            kwargs if isinstance(kwargs, dict) else None, self.tools, self.template_date
        )


def as_mapping(name: str, value: Any, example: str) -> dict[str, Any] | None:
    """The mapping in a setting, given as such or as JSON text; None if it is unset."""
    found = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            found = parse_json(value)
    if found is not None and not isinstance(found, Mapping):
        raise TokenRatioError(
            f"{name} must be a mapping such as {example}, not {shown_value(name, value)}"
        )
    return None if found is None else dict(found)


def template_of(
    options: TemplateOptions | Any,
    tokenizer: "PreTrainedTokenizerBase",
    model: str | None,
    *,
    day: str | None = None,
    report: Callable[[str], None] = print,
) -> tuple["PreTrainedTokenizerBase", "TemplateSettings"]:
    """The tokenizer with its chat template, and the settings to render with.

    Args:
        options: an object with the fields of `TemplateOptions`.
        model: its folder may record the settings a run was trained with.
        day: the date of a resumed output; it takes precedence over the run's.
        report: called with a line about the settings taken from the run.
    Raises:
        TokenRatioError: the template cannot be read, or a setting is not valid.
    """
    from tokenratio.data.template import TemplateSettings, with_chat_template
    from tokenratio.run_folder import read_run_file

    began = None if model is None else read_run_file(model)
    config = {} if began is None else began["config"]
    given = {name: getattr(options, name) for name in TEMPLATE_FLAGS[1:]}
    example = "{enable_thinking: false}"
    given["chat_template_kwargs"] = as_mapping(
        "chat_template_kwargs", given["chat_template_kwargs"], example
    )
    taken = {name: config.get(name) for name, value in given.items() if value is None}
    taken = {name: value for name, value in taken.items() if value}
    if given["template_date"] is None and day is not None:
        taken["template_date"] = day
    settings = TemplateSettings.of(**{**given, **taken})
    tokenizer = with_chat_template(tokenizer, options.chat_template)
    used = {name: value for name, value in settings.record(tokenizer).items() if name in taken}
    if used and began is not None:
        listed = ", ".join(f"{name} {value}" for name, value in used.items())
        report(f"{model}: rendered as it was trained: {listed}")
    return tokenizer, settings
