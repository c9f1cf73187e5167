"""Prompts to generate from: the same ones that training on the source uses."""

from collections.abc import Sequence
from typing import Any

from tokenratio.data.chat import Prompt, prompt_of
from tokenratio.data.columns import Columns, SourceColumns
from tokenratio.data.defects import RowDefectError
from tokenratio.data.display import printable
from tokenratio.data.files import SourceRow
from tokenratio.data.formats import EXAMPLE_TYPES, DataParser
from tokenratio.data.layouts import use_of
from tokenratio.data.messages import with_context
from tokenratio.data.sources import Source, locate, source_name
from tokenratio.errors import TokenRatioError


def read_prompts(
    source: Source, *, split: str | None = None, columns: Columns | None = None
) -> list[tuple[str, Prompt]]:
    """`(origin, prompt)` of every row; a prompt is a text or a conversation.

    For pairs and completions it is the prompt that training reads, even if the row cannot be
    trained on (a blank response). In other rows, a conversation ends before the assistant's last
    turns, and MT-Bench's `turns` give the first. A conversation keeps its row's `tools` and
    `chat_template_kwargs`.

    Args:
        source, split: see `read_rows`.
        columns: see `SourceColumns`.
    Raises:
        TokenRatioError: no rows, or a row without a usable prompt.
    """
    prompts = [
        prompt
        for part in locate(source, split=split)
        for prompt in _prompts_of(part.rows(), columns)
    ]
    if not prompts:
        raise TokenRatioError(f"{source_name(source)} has no rows")
    return prompts


def _prompts_of(rows: Sequence[SourceRow], columns: Columns | None) -> list[tuple[str, Prompt]]:
    for row in rows:
        if row.problem is not None:
            raise TokenRatioError(printable(f"{row.origin}: {row.problem}"))
    alone = SourceColumns(rows, "prompt", columns)
    use = use_of(alone.fields())
    trained = {} if use is None else _trained(rows, DataParser([rows], EXAMPLE_TYPES[use], columns))
    # One conversation makes all rows of the source conversations.
    is_chat = alone.is_chat or any(not isinstance(prompt, str) for prompt in trained.values())
    return [
        (row.origin, trained[id(row)] if id(row) in trained else _alone(row, alone, is_chat))
        for row in rows
    ]


def _trained(rows: Sequence[SourceRow], parser: DataParser[Any]) -> dict[int, Prompt]:
    """The prompts of the rows that can be trained on, by the row's `id`."""
    prompts: dict[int, Prompt] = {}
    for row in rows:
        try:
            example = parser.parse(row)
        except RowDefectError:
            continue  # it may still have a prompt
        if example.prompt:  # `text` has none
            prompts[id(row)] = prompt_of(example.prompt, example.tools, example.template_kwargs)
    return prompts


def _alone(row: SourceRow, columns: SourceColumns, is_chat: bool) -> Prompt:
    """The prompt of a row, from its prompt column alone."""
    try:
        parts = columns.parts(row)
        prompt = parts.prompt
        assert prompt is not None
        if isinstance(prompt, str):
            if not is_chat:
                return prompt
            prompt = [{"role": "user", "content": prompt}]
        turns = list(prompt)
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        if not turns:
            raise TokenRatioError(f"{row.origin}: the prompt has no turn of the user")
        turns = with_context(turns, parts.system, parts.history)
        return prompt_of(turns, parts.tools, parts.template_kwargs)
    except RowDefectError as error:
        raise TokenRatioError(printable(f"{row.origin}: {error}")) from None
