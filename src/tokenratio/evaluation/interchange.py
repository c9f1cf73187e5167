"""AlpacaEval's and MT-Bench's files, read and written: outputs, answers, judgements, questions.

Field names are those of tatsu-lab/alpaca_eval (`model_outputs.json`, `annotations.json`) and of
lm-sys/FastChat's llm_judge (`model_answer/*.jsonl`, `model_judgment/*_pair.jsonl`). Fields this
module does not know are kept in `extra` and written back, those of a single choice aside.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from tokenratio.data.files import SourceRow, read_file
from tokenratio.errors import TokenRatioError
from tokenratio.run_folder import replace_text

T = TypeVar("T")
Winner = Literal["model_1", "model_2", "tie", "error"]

_WINNERS = ("model_1", "model_2", "tie", "error")


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
        preference: 1 if the first output wins, 2 if the second, 1.5 for a draw, between them a
            judge's probability; None where the judge gave no verdict.
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
class AlpacaInstruction:
    """One of AlpacaEval's instructions, with the output others are compared with where given."""

    instruction: str
    dataset: str | None = None
    reference_output: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MtBenchQuestion:
    """A question of MT-Bench, in turns."""

    question_id: int
    category: str
    turns: tuple[str, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def conversation(self, answers: Sequence[str] = ()) -> list[dict[str, str]]:
        """What a model is asked after it gave `answers` to the first turns: the next turn.

        >>> MtBenchQuestion(1, "math", ("2+2?", "Twice that?")).conversation(["4"])[-1]
        {'role': 'user', 'content': 'Twice that?'}
        """
        messages = []
        for turn, answer in zip(self.turns, answers, strict=False):
            messages.append({"role": "user", "content": turn})
            messages.append({"role": "assistant", "content": answer})
        return [*messages, {"role": "user", "content": self.turns[len(answers)]}]


@dataclass(frozen=True)
class MtBenchAnswer:
    """A model's answers to a question's turns, as in FastChat's `model_answer/*.jsonl`.

    Attributes:
        choices: for each sample, its answer to each turn.
        tstamp: when, in seconds since 1970.
        answer_id: any name; by default one made from the contents.
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
        g1_winner: with `model_1`'s answer first; `"error"` where the judge gave no verdict.
        g2_winner: with `model_2`'s answer first.
        judge: the judging model and the name of its prompt ("pair-v2").
        turn: 1, or 2 for a verdict on both turns.
        tstamp: when, in seconds since 1970.
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
        """What both orders agree on; `"inconsistent"`, which MT-Bench counts as a tie, if nothing.

        `"error"` if either order has no verdict: MT-Bench leaves such a game out.
        """
        if "error" in (self.g1_winner, self.g2_winner):
            return "error"
        return self.g1_winner if self.g1_winner == self.g2_winner else "inconsistent"


def read_alpaca_outputs(path: str | Path) -> list[AlpacaOutput]:
    """AlpacaEval's outputs, a JSON list.

    Raises:
        TokenRatioError: here and in the other readers: a file that cannot be read, or a record that
            is not what it should be; names file and line (in a JSON list, the record, from 1).
    """
    return _read(path, lambda row: AlpacaOutput(**row.known(_OUTPUT), extra=row.rest()))


def write_alpaca_outputs(path: str | Path, outputs: Iterable[AlpacaOutput]) -> None:
    """Write what `alpaca_eval --model_outputs` reads."""
    _write_list(path, map(_fields, outputs))


def read_alpaca_annotations(path: str | Path) -> list[AlpacaAnnotation]:
    """AlpacaEval's annotations, a JSON list; the draws of old files, preference 0, become 1.5."""

    def parse(row: "_Row") -> AlpacaAnnotation:
        known = row.known(_ANNOTATION)
        preference = row.number("preference", or_none=True)
        if preference is not None and math.isnan(preference):
            preference = None
        if preference == 0:
            preference = 1.5
        if preference is not None and not 1 <= preference <= 2:
            row.refuse(f"preference must lie between 1 and 2, not {preference}")
        return AlpacaAnnotation(**known, preference=preference, extra=row.rest())

    return _read(path, parse)


def write_alpaca_annotations(path: str | Path, annotations: Iterable[AlpacaAnnotation]) -> None:
    """Write annotations; a missing verdict becomes null."""
    _write_list(path, map(_fields, annotations))


def read_alpaca_instructions(path: str | Path) -> list[AlpacaInstruction]:
    """AlpacaEval's evaluation set: JSON or JSON lines with an `instruction` each."""
    return _read(path, lambda row: AlpacaInstruction(**row.known(_INSTRUCTION), extra=row.rest()))


def read_mt_bench_questions(path: str | Path) -> list[MtBenchQuestion]:
    """MT-Bench's `question.jsonl`, a question per line."""

    def parse(row: "_Row") -> MtBenchQuestion:
        turns = row.texts("turns")
        if not turns:
            row.refuse("turns must not be empty")
        known = row.known(("category",))
        return MtBenchQuestion(row.whole("question_id"), turns=turns, **known, extra=row.rest())

    return _read(path, parse)


def read_mt_bench_answers(path: str | Path) -> list[MtBenchAnswer]:
    """FastChat's answers, a question per line."""

    def parse(row: "_Row") -> MtBenchAnswer:
        choices = row.take("choices")
        if not isinstance(choices, list) or not all(isinstance(each, dict) for each in choices):
            row.refuse(f"choices must be a list of objects, not {choices!r:.80}")
        turns = [_Row(row.origin, dict(choice)) for choice in choices]
        return MtBenchAnswer(
            row.whole("question_id"),
            choices=tuple(choice.texts("turns") for choice in turns),
            tstamp=row.number("tstamp", or_none=True) or 0.0,
            **row.known(("answer_id", "model_id")),
            extra=row.rest(),
        )

    return _read(path, parse)


def write_mt_bench_answers(path: str | Path, answers: Iterable[MtBenchAnswer]) -> None:
    """Write what FastChat's `gen_judgment.py` reads."""

    def record(answer: MtBenchAnswer) -> dict[str, Any]:
        fields = _fields(answer)
        fields["choices"] = [
            {"index": index, "turns": list(turns)} for index, turns in enumerate(answer.choices)
        ]
        return fields

    _write_lines(path, map(record, answers))


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
        judge = row.texts("judge")
        if len(judge) != 2:
            row.refuse("judge must be the names of a model and of a prompt")
        row.fields.setdefault("turn", 1)  # score-based games of old files have none
        return MtBenchJudgement(
            row.whole("question_id"),
            judge=(judge[0], judge[1]),
            turn=row.whole("turn"),
            tstamp=row.number("tstamp", or_none=True) or 0.0,
            **winners,
            **row.known(("model_1", "model_2")),
            **{name: row.fields.pop(name) for name in _JUDGEMENT_TEXTS if row.has_text(name)},
            extra=row.rest(),
        )

    return _read(path, parse)


def write_mt_bench_judgements(path: str | Path, judgements: Iterable[MtBenchJudgement]) -> None:
    """Write what FastChat's `show_result.py` reads."""
    _write_lines(path, map(_fields, judgements))


# Names ending in "?" may be missing or null.
_OUTPUT = ("instruction", "output", "generator?", "dataset?")
_ANNOTATION = (
    *("instruction", "output_1", "output_2", "generator_1", "generator_2"),
    *("annotator", "dataset?"),
)
_INSTRUCTION = ("instruction", "dataset?", "reference_output?")
_JUDGEMENT_TEXTS = ("g1_user_prompt", "g1_judgment", "g2_user_prompt", "g2_judgment")


@dataclass
class _Row:
    """A record being taken apart: every field is taken once, the rest is `extra`."""

    origin: str
    fields: dict[str, Any]

    def refuse(self, problem: str) -> None:
        raise TokenRatioError(f"{self.origin}: {problem}")

    def take(self, name: str) -> Any:
        if name not in self.fields:
            self.refuse(f"no field {name!r}")
        return self.fields.pop(name)

    def has_text(self, name: str) -> bool:
        return isinstance(self.fields.get(name), str)

    def known(self, names: Iterable[str]) -> dict[str, Any]:
        """Text fields by name."""
        taken: dict[str, Any] = {}
        for name in names:
            plain = name.removesuffix("?")
            value = self.fields.pop(plain, None) if name != plain else self.take(plain)
            if not isinstance(value, str) and not (value is None and name != plain):
                self.refuse(f"{plain} must be a text, not {value!r:.80}")
            taken[plain] = value
        return taken

    def texts(self, name: str) -> tuple[str, ...]:
        value = self.take(name)
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            self.refuse(f"{name} must be a list of texts, not {value!r:.80}")
        return tuple(value)

    def whole(self, name: str) -> int:
        value = self.take(name)
        if not isinstance(value, int) or isinstance(value, bool):
            self.refuse(f"{name} must be a whole number, not {value!r:.80}")
        return int(value)

    def number(self, name: str, *, or_none: bool = False) -> float | None:
        value = self.fields.pop(name, None) if or_none else self.take(name)
        if value is None and or_none:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            self.refuse(f"{name} must be a number, not {value!r:.80}")
        return float(value)

    def rest(self) -> dict[str, Any]:
        return self.fields


def _read(path: str | Path, parse: Callable[[_Row], T]) -> list[T]:
    rows: list[SourceRow] = read_file(Path(path), str(path))
    for row in rows:
        if row.problem is not None:
            raise TokenRatioError(f"{row.origin}: {row.problem}")
    if not rows:
        raise TokenRatioError(f"{path}: no records")
    return [parse(_Row(row.origin, dict(row.fields))) for row in rows]


def _fields(record: Any) -> dict[str, Any]:
    """A record's fields, those that are None but for the preference left out, then its extra."""
    named = {name: value for name, value in vars(record).items() if name != "extra"}
    kept = {k: v for k, v in named.items() if v is not None or k == "preference"}
    return kept | {k: v for k, v in record.extra.items() if k not in named}


def _write_list(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    replace_text(Path(path), _json(list(records), path, indent=2) + "\n")


def _write_lines(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    replace_text(Path(path), "".join(_json(record, path) + "\n" for record in records))


def _json(value: Any, path: str | Path, **options: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False, **options)
    except (TypeError, ValueError) as error:
        raise TokenRatioError(f"{path} is not written: JSON cannot hold a value: {error}") from None
