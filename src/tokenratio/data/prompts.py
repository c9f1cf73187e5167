"""Prompts to generate from: the column `prompt` of any source, or what benchmarks call it."""

from collections.abc import Mapping

from tokenratio.data.chat import Prompt, prompt_of
from tokenratio.data.defects import RowDefectError
from tokenratio.data.files import SourceRow
from tokenratio.data.formats import template_kwargs_of, tools_of
from tokenratio.data.sources import Source, read_rows
from tokenratio.data.worlds import is_world_source, world_rows
from tokenratio.errors import TokenRatioError

# MT-Bench asks `turns`, AlpacaEval an `instruction`.
_COLUMNS = ("prompt", "instruction", "turns")


def read_prompts(source: Source, *, split: str | None = None) -> list[tuple[str, Prompt]]:
    """`(origin, prompt)` of every row; a prompt is a text or a conversation.

    A conversation keeps what its row tells the chat template (`tools`, `chat_template_kwargs`).
    A conversation keeps its turns up to the last one that is not the assistant's. Of a benchmark's
    `turns` the first is taken.

    Raises:
        TokenRatioError: a row without a usable prompt, named by its origin, or no rows.
    """
    if isinstance(source, str) and is_world_source(source):
        source = [
            row if isinstance(row, Mapping) else {"prompt": row} for row in world_rows(source)
        ]
    prompts = [(row.origin, _prompt_of(row)) for row in read_rows(source, split=split)]
    if not prompts:
        raise TokenRatioError(f"{source} holds no rows")
    return prompts


def _prompt_of(row: SourceRow) -> Prompt:
    if row.problem is not None:
        raise TokenRatioError(f"{row.origin}: {row.problem}")
    name = next((name for name in _COLUMNS if name in row.fields), None)
    if name is None:
        raise TokenRatioError(f"{row.origin}: no column {' or '.join(_COLUMNS)}")
    value = row.fields[name]
    if name == "turns" and isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(_is_message(turn) for turn in value):
        turns = list(value)
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        if turns:
            try:
                tools, template_kwargs = tools_of(row.fields), template_kwargs_of(row.fields)
            except RowDefectError as error:
                raise TokenRatioError(f"{row.origin}: {error}") from None
            return prompt_of(turns, tools, template_kwargs)
    raise TokenRatioError(f"{row.origin}: {name} is neither a text nor a conversation")


def _is_message(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )
