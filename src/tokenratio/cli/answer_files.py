"""Converts files of answers between tokenratio, AlpacaEval and MT-Bench."""

import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenratio.cli.convert import ConvertOptions
from tokenratio.data.chat import Conversation, Prompt, prompt_extras
from tokenratio.data.files import read_file
from tokenratio.data.prompts import read_prompts
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.interchange import (
    AlpacaOutput,
    MtBenchAnswer,
    read_alpaca_outputs,
    read_mt_bench_answers,
    read_mt_bench_questions,
    write_alpaca,
    write_mt_bench,
)
from tokenratio.evaluation.journal import read_settings, settings_path
from tokenratio.evaluation.response_files import read_responses, write_responses
from tokenratio.models.response import Response

# Fields that only a record of this format has.
_FIELDS = {
    "generations": ("id", "prompt", "samples"),
    "alpaca-eval": ("instruction", "output"),
    "mt-bench": ("question_id", "choices"),
}
_NUMBER = re.compile(r"(?<![0-9])[0-9]{1,18}$")


@dataclass(frozen=True)
class _Answers:
    """Answers as `(id, prompt, samples)`, the model's name, and a note of what was left out.

    Benchmarks' files do not record how an answer ended, so its `finish_reason` is "unknown".
    """

    answers: Sequence[tuple[str, Prompt, tuple[Response, ...]]]
    generator: str | None
    left_out: str = ""


def convert(given: str, options: ConvertOptions) -> str:
    """Write the converted file; returns what was done, in words."""
    path, output = Path(given), Path(options.output)
    kind = _kind_of(path)
    if kind == options.to:
        raise TokenRatioError(f"{path} is already in the format {kind}")
    inputs = [path] if options.questions is None else [path, Path(options.questions)]
    _check_output(output, inputs, options)
    found = _READERS[kind](path, options)
    generator = options.generator or found.generator
    left_out = _WRITERS[options.to](output, found, generator, options)
    text = f"{len(found.answers)} answers of {generator or 'an unnamed model'} in {output}"
    return "; ".join(part for part in (text, found.left_out, left_out) if part)


def _kind_of(path: Path) -> str:
    rows = read_file(path, str(path))
    if not rows:
        raise TokenRatioError(f"{path} has no records")
    if rows[0].problem is not None:
        raise TokenRatioError(f"{rows[0].origin}: {rows[0].problem}")
    for kind, names in _FIELDS.items():
        if all(name in rows[0].fields for name in names):
            return kind
    kinds = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in _FIELDS.items())
    raise TokenRatioError(f"{rows[0].origin} does not have a supported format ({kinds})")


def _check_output(output: Path, inputs: Sequence[Path], options: ConvertOptions) -> None:
    written = [output, *([settings_path(output)] if options.to == "generations" else [])]
    for path in written:
        if path.is_dir():
            raise TokenRatioError(f"{path} is a folder")
        if path.resolve() in {given.resolve() for given in inputs}:
            raise TokenRatioError(f"--output {path} is an input: choose another name")
        if path.exists() and not options.overwrite:
            raise TokenRatioError(
                f"{path} already exists: choose another --output, or replace it with --overwrite"
            )


def _read_responses(path: Path, options: ConvertOptions) -> _Answers:
    generations = read_responses(path)
    settings = read_settings(path)
    made = {settings.get(generation.settings, {}).get("model") for generation in generations}
    answers = [(each.id, each.prompt, each.samples) for each in generations]
    return _Answers(answers, _only(made, path, options))


def _read_alpaca(path: Path, options: ConvertOptions) -> _Answers:
    outputs = read_alpaca_outputs(path)
    # If an instruction occurs twice, its ids are used in order.
    ids: dict[Prompt, deque[str]] = {}
    for id, prompt in read_prompts(options.questions) if options.questions is not None else []:
        text = _single_turn(prompt)
        if text is not None:
            ids.setdefault(text, deque()).append(id)
    answers = []
    for number, each in enumerate(outputs, start=1):
        own = each.extra.get("id")
        id = own if isinstance(own, str) else f"{path.name}:{number}"
        if options.questions is not None:
            if not ids.get(each.instruction):
                raise TokenRatioError(
                    f"{path}:{number}: {options.questions} does not have this instruction, or has "
                    f"it too few times: {each.instruction!r:.80}"
                )
            id = ids[each.instruction].popleft()
        answers.append((id, each.instruction, (Response(each.output),)))
    return _Answers(answers, _only({each.generator for each in outputs}, path, options))


def _read_mt_bench(path: Path, options: ConvertOptions) -> _Answers:
    if options.questions is None:
        raise TokenRatioError(f"{path} has no questions: give MT-Bench's with --questions")
    origins = [origin for origin, _ in read_prompts(options.questions)]
    asked = zip(origins, read_mt_bench_questions(options.questions), strict=True)
    questions = {question.question_id: (origin, question) for origin, question in asked}
    found, answers, num_others = read_mt_bench_answers(path), [], 0
    for number, each in enumerate(found, start=1):
        where = f"{path}: answer {number}, question {each.question_id}"
        if each.question_id not in questions:
            raise TokenRatioError(f"{where}: {options.questions} does not have this question")
        origin, question = questions[each.question_id]
        turns = [turns for turns in each.choices if len(turns) >= options.turn]
        if not turns or len(turns) < len(each.choices) or len(question.turns) < options.turn:
            raise TokenRatioError(f"{where}: it has no turn {options.turn}")
        before = {answered[: options.turn - 1] for answered in turns}
        if len(before) > 1:
            raise TokenRatioError(
                f"{where}: its {len(turns)} choices differ before turn {options.turn}, so they "
                "answer different prompts"
            )
        prompt: Prompt = question.turns[0]
        if options.turn > 1:
            prompt = Conversation(question.conversation(before.pop()))
        samples = [Response(answered[options.turn - 1]) for answered in turns]
        num_others += sum(len(answered) - options.turn for answered in turns)
        answers.append((origin, prompt, tuple(samples)))
    left_out = f"{num_others} answers to later turns left out" if num_others else ""
    return _Answers(answers, _only({each.model_id for each in found}, path, options), left_out)


def _write_generations(
    output: Path, found: _Answers, generator: str | None, options: ConvertOptions
) -> str:
    write_responses(
        [(id, prompt) for id, prompt, _ in found.answers],
        lambda prompts: ((id, samples) for id, _, samples in found.answers),
        output,
        {"model": generator, "converted": True},
        overwrite=options.overwrite,
        report=lambda line: None,
    )
    return ""


def _write_alpaca(
    output: Path, found: _Answers, generator: str | None, options: ConvertOptions
) -> str:
    outputs, num_others = [], 0
    for id, prompt, samples in found.answers:
        _refuse_extras(id, prompt)
        text = _single_turn(prompt)
        if text is None:
            raise TokenRatioError(
                f"{id}: the prompt has several turns; AlpacaEval's instructions have one"
            )
        outputs.append(AlpacaOutput(text, samples[0].text, generator, extra={"id": id}))
        num_others += len(samples) - 1
    write_alpaca(output, outputs)
    return f"{num_others} further samples left out: AlpacaEval has one" if num_others else ""


def _write_mt_bench(
    output: Path, found: _Answers, generator: str | None, options: ConvertOptions
) -> str:
    if generator is None:
        raise TokenRatioError("MT-Bench's answers need the name of the model: give --generator")
    numbers: dict[str, int] = {}
    if options.questions is not None:
        for question in read_mt_bench_questions(options.questions):
            numbers[question.turns[0]] = question.question_id
    taken: dict[int, str] = {}
    answers = []
    for id, prompt, samples in found.answers:
        _refuse_extras(id, prompt)
        number = _question_id(id, prompt, numbers, options)
        if number in taken:
            raise TokenRatioError(f"{taken[number]} and {id} both answer question {number}")
        taken[number] = id
        # The prompt of a second turn contains the answer to the first.
        turns = () if isinstance(prompt, str) else prompt.messages
        before = tuple(_text(id, turn) for turn in turns if turn["role"] == "assistant")
        choices = tuple((*before, sample.text) for sample in samples)
        answers.append(MtBenchAnswer(number, generator, choices))
    write_mt_bench(output, answers)
    return "" if options.questions is not None else "question_id is the number at each id's end"


def _question_id(
    id: str, prompt: Prompt, numbers: Mapping[str, int], options: ConvertOptions
) -> int:
    if options.questions is not None:
        turns = (
            [prompt] if isinstance(prompt, str) else [_text(id, turn) for turn in prompt.messages]
        )
        number = next((numbers[turn] for turn in turns if turn in numbers), None)
        if number is None:
            raise TokenRatioError(f"{options.questions} does not have the question of {id}")
        return number
    ending = _NUMBER.search(id)
    if ending is None:
        raise TokenRatioError(
            f"{id} does not end in a number to use as the question's: give --questions"
        )
    return int(ending.group())


def _refuse_extras(id: str, prompt: Prompt) -> None:
    extras = " and ".join(prompt_extras(prompt))
    if extras:
        raise TokenRatioError(f"{id}: its prompt has {extras}, which the other format cannot hold")


def _single_turn(prompt: Prompt) -> str | None:
    """The text of a prompt with one turn; None for a longer conversation."""
    if isinstance(prompt, str):
        return prompt
    return _text("a prompt", prompt.messages[0]) if len(prompt.messages) == 1 else None


def _text(id: str, turn: Mapping[str, Any]) -> str:
    if "content" not in turn:
        raise TokenRatioError(f"{id}: a turn of {turn['role']} has no text, only tool calls")
    return str(turn["content"])


def _only(names: set[Any], path: Path, options: ConvertOptions) -> str | None:
    """The name that all records have in common."""
    if len(names) > 1 and options.generator is None:
        listed = ", ".join(sorted(map(str, names)))
        raise TokenRatioError(f"{path} has answers of several models ({listed}): give --generator")
    name = next(iter(names))
    return name if isinstance(name, str) else None


_READERS: dict[str, Callable[[Path, ConvertOptions], _Answers]] = {
    "generations": _read_responses,
    "alpaca-eval": _read_alpaca,
    "mt-bench": _read_mt_bench,
}
_WRITERS: dict[str, Callable[[Path, _Answers, str | None, ConvertOptions], str]] = {
    "generations": _write_generations,
    "alpaca-eval": _write_alpaca,
    "mt-bench": _write_mt_bench,
}
