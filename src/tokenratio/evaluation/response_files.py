"""Files of generated responses: written as they arrive, resumed, read.

`generations.jsonl` has a line per prompt: `id`, `prompt` (a text or messages), `tools` and
`chat_template_kwargs` where its row has them, `samples` (each with `text`, `token_ids`,
`finish_reason`) and `settings`, the digest of the settings in `generations.settings.json`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict

from tokenratio.data.chat import Prompt, prompt_extras, prompt_of
from tokenratio.data.columns import Columns
from tokenratio.data.defects import RowDefectError
from tokenratio.data.messages import messages_in, text_or_messages
from tokenratio.data.prompts import read_prompts
from tokenratio.data.sources import Source, read_rows
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.journal import Journal, LineFormat, read_settings, settings_digest
from tokenratio.models.response import Response
from tokenratio.records import as_shape


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt and its responses; `settings` is the digest of how they were made."""

    id: str
    prompt: Prompt
    samples: tuple[Response, ...]
    settings: str


class Backend(Protocol):
    """A source of responses.

    It takes `(id, prompt)` pairs and yields `(id, samples)` in any order, each as soon as it is
    finished; the consumer writes it before asking for the next.
    """

    def __call__(
        self, prompts: Sequence[tuple[str, Prompt]]
    ) -> Iterator[tuple[str, Sequence[Response]]]: ...


def write_responses(
    prompts: Sequence[tuple[str, Prompt]],
    backend: Backend,
    path: str | Path,
    settings: Mapping[str, Any],
    *,
    overwrite: bool = False,
    report: Callable[[str], None] = print,
) -> list[AnsweredPrompt]:
    """Write the responses to all prompts, asking the backend only for what the file does not have.

    Every line is on disk before the backend is asked for the next. At the end the lines are in the
    prompts' order. Of several processes (`processes.current`), each asks for its share.

    Args:
        prompts: `(id, prompt)`; ids are unique.
        path: the file; what an interrupted run wrote to it is kept.
        settings: everything that decides what the responses are: model, prompts, sampling. JSON.
        overwrite: drop the file's present content.
        report: receives lines on what was kept and dropped.
    Raises:
        TokenRatioError: the file was made with other settings or from other prompts, another
            process is writing it, or the backend failed; what it gave before is in the file.
    """
    journal = Journal(path, settings, _LINES, prompts, overwrite=overwrite, report=report)
    with closing(journal):
        missing = journal.missing
        with journal.resumable():
            for id, samples in backend(list(missing.items())) if missing else ():
                prompt = missing.pop(id)
                journal.add(AnsweredPrompt(id, prompt, tuple(samples), journal.digest))
            journal.merge()
        if missing := journal.missing:
            few = ", ".join(list(missing)[:3]) + (", …" if len(missing) > 3 else "")
            raise TokenRatioError(f"the backend left out {len(missing)} prompts: {few}")
        return journal.finish()


def read_responses(path: str | Path) -> list[AnsweredPrompt]:
    """The prompts and responses of a finished file, in its order.

    Raises:
        TokenRatioError: it cannot be read; names the line and what is wrong with it.
    """
    return _LINES.read_file(path)


def dataset_responses(
    source: Source,
    *,
    column: str = "chosen",
    split: str | None = None,
    columns: Columns | None = None,
) -> list[AnsweredPrompt]:
    """The responses in a column of a data set.

    Ids and prompts are those of `read_prompts`, so they pair with responses generated from the same
    source.

    Args:
        column: holds a text, or messages that end with the response.
        columns: of the prompts; see `SourceColumns`.
    Raises:
        TokenRatioError: a row has no usable prompt or response.
    """
    settings = settings_digest({"source": str(source), "split": split, "column": column})
    prompts = read_prompts(source, split=split, columns=columns)
    generations = []
    for (origin, prompt), row in zip(prompts, read_rows(source, split=split), strict=True):
        value = row.fields.get(column)
        if isinstance(value, str):
            value = messages_in(value) or value
        if isinstance(value, list | Mapping) and value:
            last = value if isinstance(value, Mapping) else value[-1]
            if isinstance(last, Mapping):
                value = last.get("content", last.get("value"))
        if not isinstance(value, str):
            raise TokenRatioError(
                f"{origin}: column {column} is neither a text nor messages that end with one"
            )
        sample = Response(value, finish_reason="eos")
        generations.append(AnsweredPrompt(origin, prompt, (sample,), settings))
    return generations


def date_of_responses(path: Path) -> str | None:
    """The date that a file's prompts were rendered with, if their template writes it."""
    dates = {settings.get("template_date") for settings in read_settings(path).values()}
    return next(iter(dates)) if path.exists() and len(dates) == 1 else None


def _write_line(answered: AnsweredPrompt) -> dict[str, Any]:
    prompt = answered.prompt
    return {
        "id": answered.id,
        "prompt": prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt.messages],
        **prompt_extras(prompt),
        "samples": [
            {
                "text": sample.text,
                "token_ids": None if sample.token_ids is None else list(sample.token_ids),
                "finish_reason": sample.finish_reason,
            }
            for sample in answered.samples
        ],
        "settings": answered.settings,
    }


class _Sample(TypedDict):
    text: str
    token_ids: NotRequired[list[int] | None]
    finish_reason: NotRequired[str | None]


class _Line(TypedDict):
    id: str
    prompt: str | list[dict[str, Any]]
    tools: NotRequired[list[Any] | None]
    chat_template_kwargs: NotRequired[dict[str, Any] | None]
    samples: list[_Sample]
    settings: NotRequired[str]


def _read_line(line: Mapping[str, Any], origin: str) -> AnsweredPrompt:
    found = as_shape(_Line, line, origin, "this is not a file of generations")
    if not found["samples"]:
        raise TokenRatioError(f"{origin}: no samples: this is not a file of generations")
    try:
        turns = text_or_messages(found["prompt"], "prompt")
    except RowDefectError as error:
        raise TokenRatioError(f"{origin}: {error}") from None
    prompt = prompt_of(turns, found.get("tools"), found.get("chat_template_kwargs"))
    samples = tuple(map(_response, found["samples"]))
    return AnsweredPrompt(found["id"], prompt, samples, str(found.get("settings")))


def _response(sample: _Sample) -> Response:
    ids = sample.get("token_ids")
    reason = sample.get("finish_reason") or "unknown"
    return Response(sample["text"], reason, None if ids is None else tuple(ids))


_LINES = LineFormat(
    read=_read_line,
    write=_write_line,
    key=lambda answered: answered.id,
    matches=lambda answered, prompt: answered.prompt == prompt,
    records="generations",
    items="prompts",
    done="answered",
)
