"""Contrastive prompts: the same responses after a different prompt."""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tokenratio.data.chat import render
from tokenratio.data.columns import Columns
from tokenratio.data.defects import DefectLog, RowDefectError
from tokenratio.data.encoding import begin, special_tokens, tokenise
from tokenratio.data.formats import DataParser, PreferenceExample
from tokenratio.data.messages import Text
from tokenratio.data.preparation import PreparedData
from tokenratio.data.sources import Source, locate
from tokenratio.data.template import TemplateSettings, turn_end
from tokenratio.data.validation import parse_rows
from tokenratio.errors import TokenRatioError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACE = "{prompt}"


def check_prompt_template(template: str, name: str) -> None:
    """Raise `TokenRatioError` unless the template contains `{prompt}` exactly once."""
    if template.count(PLACE) != 1:
        raise TokenRatioError(f"{name} must contain {PLACE} exactly once")


def with_prompt_template(
    data: PreparedData,
    source: Source,
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    *,
    split: str | None = "train",
    settings: TemplateSettings | None = None,
    columns: Columns | None = None,
) -> PreparedData:
    """The rows of `data` with `template` around their prompts; the responses' tokens stay.

    `{prompt}` is replaced by a text prompt, or by the last user turn of a conversation. Prompts are
    not cut, even where those of `data` were.

    Args:
        source, tokenizer, settings, columns: those `data` was prepared with.
        template: contains `{prompt}` once.
    Raises:
        TokenRatioError: a row is not in the source, or its prompt has no turn of the user.
    """
    groups = [part.rows() for part in locate(source, split=split)]
    parser = DataParser(groups, PreferenceExample, columns)
    parsed = parse_rows([row for rows in groups for row in rows], parser, DefectLog("skip"))
    examples = {example.origin: example for example in parsed.examples}
    settings = settings or TemplateSettings()
    end = turn_end(tokenizer, settings)
    rendered = []
    for origin in data.dataset["origin"]:
        if origin not in examples:
            raise TokenRatioError(f"{origin} is not in this source, so its prompt cannot be read")
        try:
            example = examples[origin]
            prompt = _fill(example.prompt, template, origin)
            rendered.append(render(replace(example, prompt=prompt), tokenizer, settings, end))
        except RowDefectError as error:
            raise TokenRatioError(f"{origin}, with the contrastive prompt: {error}") from None
    special = special_tokens(tokenizer)
    prompts = [
        np.asarray(begin(ids[0], special), np.int32)
        for ids in tokenise(tokenizer, rendered, special)
    ]
    dataset, feature = data.dataset, data.dataset.features["prompt_ids"]
    dataset = dataset.remove_columns("prompt_ids").add_column(
        "prompt_ids", prompts, feature=feature
    )
    return replace(data, dataset=dataset, cuts={})


def _fill(prompt: Text, template: str, origin: str) -> Text:
    if isinstance(prompt, str):
        return template.replace(PLACE, prompt)
    turns = [dict(message) for message in prompt]
    asked = [turn for turn in turns if turn["role"] == "user"]
    if not asked or not isinstance(asked[-1]["content"], str):
        raise TokenRatioError(f"{origin}: the prompt has no user text to put into the template")
    turns[turns.index(asked[-1])]["content"] = template.replace(PLACE, asked[-1]["content"])
    return turns
