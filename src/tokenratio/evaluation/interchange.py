"""Read and write files of AlpacaEval and MT-Bench: outputs, answers, judgements, questions.

Field names are those of tatsu-lab/alpaca_eval (`model_outputs.json`, `annotations.json`) and of
lm-sys/FastChat's llm_judge (`model_answer/*.jsonl`, `model_judgment/*_pair.jsonl`). Unknown fields
are kept in `extra` and written back, except those of a single choice.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from tokenratio.data.files import SourceRow, read_file
from tokenratio.errors import TokenRatioError
from tokenratio.records import as_shape
from tokenratio.run_folder import replace_text

T = TypeVar("T")
Winner = Literal["model_1", "model_2", "tie", "error"]

_WINNERS = ("model_1", "model_2", "tie", "error")
_JUDGEMENT_TEXTS = ("g1_user_prompt", "g1_judgment", "g2_user_prompt", "g2_judgment")


@dataclass(frozen=True)
class AlpacaOutput:
    """A model's answer to an instruction, as in AlpacaEval's `model_outputs.json`.

    Attributes:
        generator: the model's name; AlpacaEval names a model without one "Current model".
    """

    instruction: str
    output: str
    generator: str | None = None
    dataset: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AlpacaAnnotation:
    """A judgement between two outputs, as in AlpacaEval's `annotations.json`.

    Attributes:
        preference: 1 if the first output wins, 2 if the second, 1.5 for a draw, in between for a
            judge's probability; None without a verdict.
    """

    instruction: str
    output_1: str
    output_2: str
    generator_1: str
    generator_2: str
    annotator: str
    preference: float | None
    dataset: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def second_wins(self) -> float | None:
        """The probability that the second output is better."""
        return None if self.preference is None else self.preference - 1


@dataclass(frozen=True)
class MtBenchQuestion:
    """A question of MT-Bench, in turns."""

    question_id: int
    category: str
    turns: tuple[str, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def conversation(self, answers: Sequence[str] = ()) -> list[dict[str, str]]:
        """The messages up to the next turn, after `answers` to the first turns.

        >>> MtBenchQuestion(1, "math", ("2+2?", "Twice that?")).conversation(["4"])[-1]
        {'role': 'user', 'content': 'Twice that?'}
        """
        messages = []
        for turn, answer in zip(self.turns, answers, strict=False):
            messages += [
                {"role": "user", "content": turn},
                {"role": "assistant", "content": answer},
            ]
        return [*messages, {"role": "user", "content": self.turns[len(answers)]}]


@dataclass(frozen=True)
class MtBenchAnswer:
    """A model's answers to a question's turns, as in FastChat's `model_answer/*.jsonl`.

    Attributes:
        choices: for each sample, its answer to each turn.
        tstamp: time in seconds since 1970.
        answer_id: any name; by default derived from the contents.
    """

    question_id: int
    model_id: str
    choices: tuple[tuple[str, ...], ...]
    tstamp: float = field(default_factory=time.time)
    answer_id: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.answer_id:
            content = json.dumps([self.question_id, self.model_id, self.choices])
            name = hashlib.sha256(content.encode()).hexdigest()[:22]
            object.__setattr__(self, "answer_id", name)


@dataclass(frozen=True)
class MtBenchJudgement:
    """A judge's verdicts on two models' answers, as in FastChat's `model_judgment/*_pair.jsonl`.

    Attributes:
        g1_winner: with `model_1`'s answer first; `"error"` without a verdict.
        g2_winner: with `model_2`'s answer first.
        judge: the judging model and the name of its prompt ("pair-v2").
        turn: 1, or 2 for a verdict on both turns.
        tstamp: time in seconds since 1970.
    """

    question_id: int
    model_1: str
    model_2: str
    g1_winner: Winner
    g2_winner: Winner
    judge: tuple[str, str]
    turn: int = 1
    g1_user_prompt: str = ""
    g1_judgment: str = ""
    g2_user_prompt: str = ""
    g2_judgment: str = ""
    tstamp: float = field(default_factory=time.time)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def winner(self) -> Literal["model_1", "model_2", "tie", "inconsistent", "error"]:
        """The winner in both orders, or `"inconsistent"`, which MT-Bench counts as a tie.

        `"error"` if either order has no verdict; MT-Bench skips the game.
        """
        if "error" in (self.g1_winner, self.g2_winner):
            return "error"
        return self.g1_winner if self.g1_winner == self.g2_winner else "inconsistent"


def read_alpaca_outputs(path: str | Path) -> list[AlpacaOutput]:
    """AlpacaEval's outputs, a JSON list.

    Raises:
        TokenRatioError: like the other readers: the file cannot be read, or a record is wrong;
            names file and line (in a JSON list, the record, from 1).
    """
    names = ("instruction", "output", "generator?", "dataset?")
    return _read(path, lambda row: AlpacaOutput(**row.texts(*names), extra=row.fields))


def read_alpaca_annotations(path: str | Path) -> list[AlpacaAnnotation]:
    """AlpacaEval's annotations, a JSON list; preference 0, a draw in old files, becomes 1.5."""
    names = ("instruction", "output_1", "output_2", "generator_1", "generator_2", "annotator")

    def parse(row: "_Row") -> AlpacaAnnotation:
        texts = row.texts(*names, "dataset?")
        preference = row.number("preference")
        if preference is not None and math.isnan(preference):
            preference = None
        if preference == 0:
            preference = 1.5
        if preference is not None and not 1 <= preference <= 2:
            row.refuse(f"preference must lie between 1 and 2, not {preference}")
        return AlpacaAnnotation(**texts, preference=preference, extra=row.fields)

    return _read(path, parse)


def write_alpaca(
    path: str | Path, records: "Iterable[AlpacaOutput] | Iterable[AlpacaAnnotation]"
) -> None:
    """Write the JSON list that `alpaca_eval` reads; a missing verdict becomes null."""
    replace_text(Path(path), _json([_fields(record) for record in records], path, indent=2) + "\n")


def read_mt_bench_questions(path: str | Path) -> list[MtBenchQuestion]:
    """MT-Bench's `question.jsonl`, a question per line."""

    def parse(row: "_Row") -> MtBenchQuestion:
        turns = row.list_of_texts("turns")
        if not turns:
            row.refuse("turns must not be empty")
        texts = row.texts("category")
        return MtBenchQuestion(row.whole("question_id"), turns=turns, **texts, extra=row.fields)

    return _read(path, parse)


def read_mt_bench_answers(path: str | Path) -> list[MtBenchAnswer]:
    """FastChat's answers, a question per line."""

    def parse(row: "_Row") -> MtBenchAnswer:
        choices = row.take("choices", list[dict[str, Any]])
        turns = [_Row(row.origin, dict(choice)) for choice in choices]
        return MtBenchAnswer(
            row.whole("question_id"),
            choices=tuple(choice.list_of_texts("turns") for choice in turns),
            tstamp=row.number("tstamp") or 0.0,
            **row.texts("answer_id", "model_id"),
            extra=row.fields,
        )

    return _read(path, parse)


def read_mt_bench_judgements(path: str | Path) -> list[MtBenchJudgement]:
    """FastChat's pairwise judgements, a game per line.

    A line with one `winner` for both orders is read as that winner in each.
    """

    def parse(row: "_Row") -> MtBenchJudgement:
        names = ("g1_winner", "g2_winner")
        if "winner" in row.fields and "g1_winner" not in row.fields:
            winner = row.take("winner")
            row.fields |= dict.fromkeys(names, winner)
        winners = {name: row.take(name) for name in names}
        for name, winner in winners.items():
            if winner not in _WINNERS:
                row.refuse(f"{name} must be one of {', '.join(_WINNERS)}, not {winner!r}")
        judge = row.list_of_texts("judge")
        if len(judge) != 2:
            row.refuse("judge must be the names of a model and of a prompt")
        row.fields.setdefault("turn", 1)  # missing in score-based games of old files
        has = [name for name in _JUDGEMENT_TEXTS if isinstance(row.fields.get(name), str)]
        return MtBenchJudgement(
            row.whole("question_id"),
            judge=(judge[0], judge[1]),
            turn=row.whole("turn"),
            tstamp=row.number("tstamp") or 0.0,
            **winners,
            **row.texts("model_1", "model_2", *has),
            extra=row.fields,
        )

    return _read(path, parse)


def write_mt_bench(
    path: str | Path, records: "Iterable[MtBenchAnswer] | Iterable[MtBenchJudgement]"
) -> None:
    """Write the lines that FastChat's `gen_judgment.py` and `show_result.py` read."""
    replace_text(Path(path), "".join(_json(_fields(record), path) + "\n" for record in records))


@dataclass
class _Row:
    """A record being parsed: each field is taken out once; what is left is `extra`."""

    origin: str
    fields: dict[str, Any]

    def refuse(self, problem: str) -> None:
        raise TokenRatioError(f"{self.origin}: {problem}")

    def take(self, name: str, shape: Any = Any) -> Any:
        if name not in self.fields:
            self.refuse(f"no field {name!r}")
        return as_shape(shape, self.fields.pop(name), self.origin, name=name)

    def texts(self, *names: str) -> dict[str, Any]:
        """Text fields by name; names that end in "?" may be missing or null."""
        taken: dict[str, Any] = {}
        for name in names:
            plain = name.removesuffix("?")
            if name != plain:
                self.fields.setdefault(plain, None)
            taken[plain] = self.take(plain, str if name == plain else str | None)
        return taken

    def list_of_texts(self, name: str) -> tuple[str, ...]:
        return cast(tuple[str, ...], self.take(name, tuple[str, ...]))

    def whole(self, name: str) -> int:
        return int(self.take(name, int))

    def number(self, name: str) -> float | None:
        """None if it is missing or null."""
        self.fields.setdefault(name, None)
        return cast(float | None, self.take(name, float | None))


def _read(path: str | Path, parse: Callable[[_Row], T]) -> list[T]:
    rows: list[SourceRow] = read_file(Path(path), str(path))
    for row in rows:
        if row.problem is not None:
            raise TokenRatioError(f"{row.origin}: {row.problem}")
    if not rows:
        raise TokenRatioError(f"{path}: no records")
    return [parse(_Row(row.origin, dict(row.fields))) for row in rows]


def _fields(record: Any) -> dict[str, Any]:
    """A record as it is written: fields that are None are omitted, except `preference`."""
    named = {name: value for name, value in vars(record).items() if name != "extra"}
    kept = {k: v for k, v in named.items() if v is not None or k == "preference"}
    if "choices" in kept:
        choices = enumerate(kept["choices"])
        kept["choices"] = [{"index": index, "turns": list(turns)} for index, turns in choices]
    return kept | {k: v for k, v in record.extra.items() if k not in named}


def _json(value: Any, path: str | Path, **options: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False, **options)
    except (TypeError, ValueError) as error:
        raise TokenRatioError(
            f"{path} was not written: a value cannot be stored as JSON: {error}"
        ) from None
