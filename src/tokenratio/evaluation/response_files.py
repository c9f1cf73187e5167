"""The file of generated responses: written as they come, resumed, read.

`generations.jsonl` has a line per prompt: `id`, `prompt` (a text or messages), where its row has
them `tools` and `chat_template_kwargs`, `samples` (each with `text`, `token_ids`, `finish_reason`)
and `settings`, a digest. What settings it stands for is in `generations.settings.json` beside it.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tokenratio.data.chat import Prompt, prompt_extras, prompt_of
from tokenratio.data.columns import Columns
from tokenratio.data.messages import messages_in
from tokenratio.data.prompts import read_prompts
from tokenratio.data.sources import Source, read_rows
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.journal import Journal, read_whole, replace_durably
from tokenratio.models.response import Response


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt and its responses; `settings` is the digest of how they were made."""

    id: str
    prompt: Prompt
    samples: tuple[Response, ...]
    settings: str


class Backend(Protocol):
    """What responses come from.

    It is called with `(id, prompt)` pairs and yields `(id, samples)` in any order, each as soon as
    it is finished: the consumer writes it before it asks for the next.
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
    report: Callable[[str], None] = print,
) -> list[AnsweredPrompt]:
    """Write the responses to all prompts, asking the backend only for what the file does not have.

    Every line is on the disk before the backend is asked for the next. At the end the lines stand
    in the prompts' order.

    Args:
        prompts: `(id, prompt)`; ids differ.
        path: the file; what an interrupted run left of it is kept.
        settings: all that decides what the responses are: model, prompts, sampling. JSON.
        report: where it is said what was kept and dropped.

    Raises:
        TokenRatioError: the file was made with other settings or from other prompts, another
            process writes it, or the backend gave up: what it gave until then is in the file.
    """
    path, settings = Path(path), dict(settings)
    _check_ids(prompts)
    digest = settings_digest(settings)
    with Journal(path) as journal:
        if journal.dropped:
            report(f"{path}: the last line was cut off and is dropped")
        done = {}
        for number, line in enumerate(journal.lines, start=1):
            generation = _generation(line, f"{path}:{number}")
            if generation.settings != digest:
                raise TokenRatioError(_other_settings(path, generation.settings, settings))
            if generation.id in done:
                raise TokenRatioError(f"{path}:{number}: a second line with id {generation.id}")
            done[generation.id] = generation
        _check_prompts(done, prompts, path)
        if done:
            report(f"{path}: {len(done)} of {len(prompts)} prompts are already answered")
        replace_durably(
            settings_path(path), (json.dumps({digest: settings}, indent=2) + "\n").encode()
        )
        missing = {id: prompt for id, prompt in prompts if id not in done}
        try:
            for id, samples in backend(list(missing.items())) if missing else ():
                done[id] = AnsweredPrompt(id, missing.pop(id), tuple(samples), digest)
                journal.append(_line(done[id]))
        except TokenRatioError as error:
            raise TokenRatioError(
                f"{error}\n{path} has {len(done)} of {len(prompts)} prompts answered: run the same "
                "again to go on from there"
            ) from error
        if missing:
            raise TokenRatioError(f"the backend left out {len(missing)} prompts: {_few(missing)}")
        generations = [done[id] for id, _ in prompts]
        if list(done) != [id for id, _ in prompts]:
            journal.finish(map(_line, generations))
    return generations


def read_responses(path: str | Path) -> list[AnsweredPrompt]:
    """The generations of a finished file, in its order.

    Raises:
        TokenRatioError: it cannot be read; names the line and what is wrong with it.
    """
    path = Path(path)
    lines = enumerate(read_whole(path), start=1)
    generations = [_generation(line, f"{path}:{number}") for number, line in lines]
    if not generations:
        raise TokenRatioError(f"{path} holds no generations")
    _check_ids([(generation.id, generation.prompt) for generation in generations])
    return generations


def read_settings(path: str | Path) -> dict[str, dict[str, Any]]:
    """What the digests of a file of generations stand for; empty where nothing says it.

    Args:
        path: of the generations.
    """
    try:
        value = json.loads(settings_path(Path(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def dataset_responses(
    source: Source,
    *,
    column: str = "chosen",
    split: str | None = None,
    columns: Columns | None = None,
) -> list[AnsweredPrompt]:
    """The responses that a data set has, as if somebody had generated them.

    Ids and prompts are those that `read_prompts` gives, so that they pair with what was generated
    from the same source.

    Args:
        column: a text, or messages of which the last is the response.
        columns: of the prompts; see `SourceColumns`.
    Raises:
        TokenRatioError: a row without a usable prompt or response, named by its origin.
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
                f"{origin}: column {column} is neither a text nor messages that end in one"
            )
        sample = Response(value, finish_reason="eos")
        generations.append(AnsweredPrompt(origin, prompt, (sample,), settings))
    return generations


def settings_digest(settings: Mapping[str, Any]) -> str:
    """What stands for settings on every line: 16 hex digits of the SHA-256 of their JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def settings_path(path: Path) -> Path:
    """Where the settings of a file of generations or judgements stand."""
    return path.with_suffix(".settings.json")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """In which settings two runs differ, in words."""
    missing = object()
    names = sorted({*old, *new})
    pairs = {name: (old.get(name, missing), new.get(name, missing)) for name in names}
    said = [
        f"{name} {'not set' if was is missing else was!r}, now "
        f"{'not set' if now is missing else repr(now)}"
        for name, (was, now) in pairs.items()
        if was != now
    ]
    return "; ".join(said)


def _other_settings(path: Path, digest: str, settings: Mapping[str, Any]) -> str:
    old = read_settings(path).get(digest)
    said = "" if old is None else f" ({differences(old, json.loads(json.dumps(settings)))})"
    return (
        f"{path} was begun with other settings{said}: go on with those, delete the file, or choose "
        "another"
    )


def _check_ids(prompts: Sequence[tuple[str, Prompt]]) -> None:
    seen = set()
    for id, _ in prompts:
        if id in seen:
            raise TokenRatioError(f"two prompts have the id {id}: ids tell prompts apart")
        seen.add(id)


def _check_prompts(
    done: Mapping[str, AnsweredPrompt], prompts: Sequence[tuple[str, Prompt]], path: Path
) -> None:
    wanted = dict(prompts)
    for generation in done.values():
        if generation.id not in wanted:
            raise TokenRatioError(
                f"{path} has an answer to {generation.id}, which is not among the {len(wanted)} "
                "prompts: delete the file, or choose another"
            )
        if generation.prompt != wanted[generation.id]:
            raise TokenRatioError(
                f"{path}: the prompt of {generation.id} is now another: delete the file, or choose "
                "another"
            )


def _few(ids: Mapping[str, Any]) -> str:
    return ", ".join(list(ids)[:3]) + (", …" if len(ids) > 3 else "")


def _line(generation: AnsweredPrompt) -> dict[str, Any]:
    prompt = generation.prompt
    return {
        "id": generation.id,
        "prompt": prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt.messages],
        **prompt_extras(prompt),
        "samples": [
            {
                "text": sample.text,
                "token_ids": None if sample.token_ids is None else list(sample.token_ids),
                "finish_reason": sample.finish_reason,
            }
            for sample in generation.samples
        ],
        "settings": generation.settings,
    }


def _generation(line: Mapping[str, Any], origin: str) -> AnsweredPrompt:
    samples = line.get("samples")
    prompt = line.get("prompt")
    if not isinstance(line.get("id"), str) or not isinstance(prompt, str | list):
        raise TokenRatioError(f"{origin}: no id and prompt: this is no file of generations")
    if not isinstance(samples, list) or not samples:
        raise TokenRatioError(f"{origin}: no samples: this is no file of generations")
    tools, template_kwargs = line.get("tools"), line.get("chat_template_kwargs")
    if not isinstance(tools or [], list) or not isinstance(template_kwargs or {}, Mapping):
        raise TokenRatioError(f"{origin}: tools must be a list, chat_template_kwargs an object")
    return AnsweredPrompt(
        line["id"],
        prompt_of(prompt, tools, template_kwargs),
        tuple(_read_sample(sample, origin) for sample in samples),
        str(line.get("settings")),
    )


def _read_sample(sample: Any, origin: str) -> Response:
    text = sample.get("text") if isinstance(sample, Mapping) else None
    if not isinstance(text, str):
        raise TokenRatioError(f"{origin}: a sample without text")
    ids = sample.get("token_ids")
    if ids is not None and not (isinstance(ids, list) and all(type(i) is int for i in ids)):
        raise TokenRatioError(f"{origin}: token_ids is neither null nor a list of whole numbers")
    reason = str(sample.get("finish_reason"))
    return Response(text, reason, None if ids is None else tuple(ids))


def day_of_output(path: Path) -> str | None:
    """The day that a file of generations was rendered with, where its template wrote it."""
    days = {settings.get("template_date") for settings in read_settings(path).values()}
    return next(iter(days)) if path.exists() and len(days) == 1 else None
