"""Preference and fine-tuning rows of every layout, converted to one form.

The form is TRL's: prompt and responses, all texts or all lists of messages. `columns.py` decides
which columns they come from; this module combines them.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

from tokenratio.data.boundary import begins_with, extract_prompt, opening_end
from tokenratio.data.columns import NEARLY_ALL, Columns, Parts, SourceColumns
from tokenratio.data.defects import Defect, DefectKind, RowDefectError, WarningKind
from tokenratio.data.files import SourceRow
from tokenratio.data.layouts import Use
from tokenratio.data.messages import Message, Text, messages_in, with_context
from tokenratio.data.summary import Reading

# From this length on, a response that begins with the prompt repeats it on purpose.
_LONG_PROMPT = 20


class _Responses:
    SIDES: ClassVar[tuple[str, ...]]

    @property
    def responses(self) -> dict[str, Text]:
        """The responses by side: `chosen` and `rejected`, or `completion`."""
        return {side: getattr(self, side) for side in self.SIDES}

    @property
    def texts(self) -> dict[str, Text]:
        """Prompt and responses by name."""
        return {name: getattr(self, name) for name in ("prompt", *self.SIDES)}


@dataclass(frozen=True)
class PreferenceExample(_Responses):
    """A pair: all three texts are strings, or all three are lists of messages.

    Attributes:
        origin: the row's place (`SourceRow.origin`).
        prompt: what both responses answer; may be the empty string.
        chosen, rejected: the responses alone, without the prompt.
        tools: JSON schemas given to the chat template.
        template_kwargs: the row's `chat_template_kwargs`.
    """

    SIDES = ("chosen", "rejected")
    origin: str
    prompt: Text
    chosen: Text
    rejected: Text
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CompletionExample(_Responses):
    """A prompt and the response to train on; both strings or both lists of messages."""

    SIDES = ("completion",)
    origin: str
    prompt: Text
    completion: Text
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


Example = TypeVar("Example", PreferenceExample, CompletionExample)
AnyExample: TypeAlias = PreferenceExample | CompletionExample
EXAMPLE_TYPES: dict[Use, type[Any]] = {"pair": PreferenceExample, "completion": CompletionExample}


class DataParser(Generic[Example]):
    """Parses the rows of several sources; the layout is decided for each source as a whole.

    Args:
        groups: all rows of each source.
        wanted: `PreferenceExample` or `CompletionExample`.
        columns: see `SourceColumns`, also for its errors.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[SourceRow]],
        wanted: type[Example],
        columns: Columns | None = None,
    ) -> None:
        # Keyed by the row object: rows of two sources may have the same origin.
        self._parsers: dict[int, _SourceParser[Example]] = {}
        for rows in groups:
            self._parsers |= dict.fromkeys(map(id, rows), _SourceParser(rows, wanted, columns))

    def parse(self, row: SourceRow) -> Example:
        """The example of one of the rows; raises `RowDefectError` if it cannot be used."""
        found, _ = self._parsers[id(row)].parsed(row)
        if isinstance(found, RowDefectError):
            raise found
        return found

    def oddities(self, row: SourceRow) -> list[Defect]:
        """Warnings from parsing one of the rows."""
        return self._parsers[id(row)].parsed(row)[1]

    def reading(self, rows: Sequence[SourceRow]) -> Reading:
        """How these of the rows were read."""
        found = [self._parsers[id(row)].found[id(row)] for row in rows]
        parts = [part for part in found if isinstance(part, Parts)]
        unread = Counter(name for part in parts for name in part.unread)
        return Reading(dict(Counter(part.layout for part in parts)), dict(unread), len(parts))


class _SourceParser(Generic[Example]):
    def __init__(
        self, rows: Sequence[SourceRow], wanted: type[Example], columns: Columns | None
    ) -> None:
        self._wanted: Callable[..., Example] = wanted
        self._sides: tuple[str, ...] = wanted.SIDES
        use: Use = "pair" if wanted is PreferenceExample else "completion"
        self._columns = SourceColumns(rows, use, columns)
        self.found = {id(row): self._parts(row) for row in rows}
        parts = [found for found in self.found.values() if isinstance(found, Parts)]
        self._repeats = _most(_repeat_prompt(part) for part in parts)
        self._num_shared, self._num_implicit = _count_shared(parts)
        self._parsed: dict[int, tuple[Example | RowDefectError, list[Defect]]] = {}
        self._odd: list[Defect] = []

    def _parts(self, row: SourceRow) -> Parts | RowDefectError:
        try:
            return self._columns.parts(row)
        except RowDefectError as error:
            return error

    def parsed(self, row: SourceRow) -> tuple[Example | RowDefectError, list[Defect]]:
        """The example, or why there is none, and the warnings about it."""
        if id(row) not in self._parsed:
            self._odd = []
            self._parsed[id(row)] = (self._example(row), self._odd)
        return self._parsed[id(row)]

    def _example(self, row: SourceRow) -> Example | RowDefectError:
        found = self.found[id(row)]
        if isinstance(found, RowDefectError):
            return found
        try:
            prompt, responses = self._fitted(found, row.origin)
        except RowDefectError as error:
            return error
        if any(isinstance(text, str) and messages_in(text) for text in responses):
            detail = "a response is messages as JSON text, unlike most of its column: kept as text"
            self._odd.append(Defect(row.origin, WarningKind.MESSAGES_AS_TEXT, detail))
        return self._wanted(row.origin, prompt, *responses, found.tools, found.template_kwargs)

    def _fitted(self, parts: Parts, origin: str) -> tuple[Text, list[Any]]:
        prompt = parts.prompt
        responses: list[Any] = list(parts.responses)
        names = self._sides if len(responses) == 1 else ("chosen", "rejected")
        conversational = isinstance(responses[0], list)
        if any(isinstance(response, list) != conversational for response in responses):
            raise RowDefectError(
                DefectKind.MIXED_FORMAT,
                f"{' and '.join(names)} must both be strings, or both lists of messages",
            )
        if isinstance(prompt, str) and not conversational:
            prompt, responses = self._once(prompt, responses, origin)
        elif prompt is None and not conversational:
            prompt, responses = self._split_text(responses, parts)
            if parts.system or parts.history:
                raise RowDefectError(
                    DefectKind.MIXED_FORMAT,
                    "a system prompt or history cannot be combined with texts of whole dialogues",
                )
            return prompt, responses[: len(self._sides)]
        if isinstance(prompt, str) and not conversational:
            if not self._columns.is_chat or parts.is_text:
                return prompt, responses
            prompt = [{"role": "user", "content": prompt}]
        if not conversational:
            responses = [[{"role": "assistant", "content": text}] for text in responses]
        turns, responses = self._conversation(prompt, responses, parts, origin)
        turns = with_context(turns, parts.system, parts.history)
        _check_turns(turns, responses)
        return turns, responses[: len(self._sides)]

    def _conversation(
        self, prompt: Text | None, responses: list[Any], parts: Parts, origin: str
    ) -> tuple[list[Message], list[Any]]:
        if parts.is_whole:
            return responses[0][:-1], [responses[0][-1:]]
        if prompt is None:
            return _split_conversations(responses)
        if isinstance(prompt, str):
            return _split_mixed(prompt, responses)
        rests = [_after(response, prompt) for response in responses]
        if all(rests):
            self._repeated(origin, f"{_begin(rests)}: removed")
            return prompt, rests
        if any(rests):
            raise RowDefectError(
                DefectKind.BAD_CONVERSATION,
                "only one response begins with the prompt's messages and so has a turn of 'user'",
            )
        if prompt and prompt[-1] in [response[0] for response in responses if response]:
            prompt = prompt[:-1]  # a conversation that ends in one of the answers
        return prompt, responses

    def _once(self, prompt: str, responses: list[Any], origin: str) -> tuple[str, list[Any]]:
        """Prompt and responses, the prompt removed from the responses where they repeat it."""
        ends = [begins_with(response, prompt) for response in responses]
        rests = [response[end:] for response, end in zip(responses, ends, strict=True)]
        if all(ends) and all(rest.strip() for rest in rests):
            is_long = len(prompt.strip()) >= _LONG_PROMPT and len(responses) > 1
            taken = self._repeats or is_long
            self._repeated(origin, f"{_begin(rests)}: {'removed' if taken else 'kept'}")
            return (prompt, rests) if taken else (prompt, responses)
        continues = any(end and rest.strip() for end, rest in zip(ends, rests, strict=True))
        if continues and len(responses) > 1 and len(prompt.strip()) >= _LONG_PROMPT:
            side = "chosen" if ends[0] else "rejected"
            self._repeated(origin, f"only {side} begins with the prompt: kept")
        elif len(responses) > 1 and prompt.strip():
            # The responses are whole transcripts and contain the prompt in its intended form.
            length = extract_prompt(*responses)
            transcript = responses[0][:length]
            if opening_end(transcript) == length > 0 and prompt.strip() in transcript:
                self._repeated(origin, "both responses are transcripts with the prompt: removed")
                return transcript, [response[length:] for response in responses]
        return prompt, responses

    def _repeated(self, origin: str, detail: str) -> None:
        self._odd.append(Defect(origin, WarningKind.PROMPT_REPEATED, detail))

    def _split_text(self, responses: list[Any], parts: Parts) -> tuple[str, list[Any]]:
        _check_pair(responses)
        length = extract_prompt(*responses)
        prompt = responses[0][:length]
        is_sound = opening_end(prompt) == length > 0 or 2 * self._num_shared >= self._num_implicit
        if not prompt.strip() or not is_sound:
            raise RowDefectError(DefectKind.MISSING_COLUMN, self._no_prompt(parts, prompt))
        return prompt, [response[length:] for response in responses]

    def _no_prompt(self, parts: Parts, prompt: str) -> str:
        shared = "chosen and rejected share no beginning"
        if prompt.strip():
            without = self._num_implicit - self._num_shared
            shared += f" in {without:,} of {self._num_implicit:,} rows"
        text = f"no prompt column; {shared}"
        if parts.unread:
            one, names = len(parts.unread) == 1, ", ".join(parts.unread)
            columns = f"column {names} is" if one else f"columns {names} are"
            text += f"; the {columns} not read: rename {'it' if one else 'one'} to prompt, or set "
            text += "columns"
        return text


def _split_conversations(responses: list[Any]) -> tuple[list[Message], list[Any]]:
    if len(responses) == 1:
        if len(responses[0]) < 2:
            raise RowDefectError(DefectKind.MISSING_COLUMN, "no prompt")
        return responses[0][:-1], [responses[0][-1:]]
    _check_pair(responses)
    length = extract_prompt(*responses)
    if not length and any(response[0]["role"] != "assistant" for response in responses):
        raise RowDefectError(
            DefectKind.BAD_CONVERSATION, "chosen and rejected begin with different messages"
        )
    return responses[0][:length], [response[length:] for response in responses]


def _check_pair(responses: list[Any]) -> None:
    if len(responses) == 1:
        raise RowDefectError(DefectKind.MISSING_COLUMN, "no prompt")
    if any(not response for response in responses):
        raise RowDefectError(DefectKind.BLANK_RESPONSE, "a response is empty")
    if responses[0] == responses[1]:
        # Checked here: without a difference the prompt has no end.
        raise RowDefectError(DefectKind.IDENTICAL_PAIR, "chosen and rejected are the same")


def _split_mixed(prompt: str, responses: list[Any]) -> tuple[list[Message], list[Any]]:
    """A text prompt with messages: answers alone, or whole conversations that contain it."""
    if all(response[0]["role"] == "assistant" for response in responses if response):
        return [{"role": "user", "content": prompt}], responses
    turns, rest = _split_conversations(responses)
    asked = [turn.get("content", "").strip() for turn in turns if turn["role"] == "user"]
    # One of the turns, or, as text, all of them.
    if prompt.strip() not in asked and not (asked and all(text in prompt for text in asked)):
        raise RowDefectError(
            DefectKind.MIXED_FORMAT,
            "the prompt column is not a user turn of the conversations; if they contain the whole "
            "prompt, leave it out with columns: {prompt: null}",
        )
    return turns, rest


def _after(response: list[Message], prompt: list[Message]) -> list[Message]:
    """The turns after the prompt's, which may omit its system turn; empty if not repeated."""
    bare = [turn for turn in prompt if turn["role"] not in ("system", "developer")]
    for turns in (prompt, bare):
        if turns and len(response) > len(turns) and response[: len(turns)] == turns:
            return response[len(turns) :]
    return []


def _check_turns(prompt: list[Message], responses: list[list[Message]]) -> None:
    if not prompt:
        raise RowDefectError(DefectKind.BAD_CONVERSATION, "the prompt has no message")
    for response in responses:
        for turn in response:
            # Every token of a response is trained on, as an action of the policy.
            if turn["role"] != "assistant":
                raise RowDefectError(
                    DefectKind.BAD_CONVERSATION,
                    f"a response has a turn of {turn['role']!r}, but only 'assistant' turns are "
                    "trained on",
                )


def _repeat_prompt(parts: Parts) -> bool | None:
    """Whether the responses of a text row begin with its prompt; None for other rows."""
    if not isinstance(parts.prompt, str) or not parts.prompt.strip():
        return None
    texts = [text for text in parts.responses if isinstance(text, str)]
    if len(texts) != len(parts.responses) or not texts:
        return None
    return all(begins_with(text, parts.prompt) for text in texts)


def _most(answers: Iterator[bool | None]) -> bool:
    """Whether nearly all of at least two rows say yes."""
    known = [answer for answer in answers if answer is not None]
    return len(known) > 1 and sum(known) >= NEARLY_ALL * len(known)


def _count_shared(parts: Sequence[Parts]) -> tuple[int, int]:
    """Of the text rows without a prompt, how many have one implicitly, and how many there are."""
    implicit = [
        part.responses
        for part in parts
        if part.prompt is None
        and len(part.responses) == 2
        and all(isinstance(text, str) and text for text in part.responses)
    ]
    shared = [pair[0][: extract_prompt(*pair)] for pair in implicit]
    return sum(bool(str(text).strip()) for text in shared), len(implicit)


def _begin(rests: Sequence[Any]) -> str:
    both = len(rests) == 2
    return "both responses begin with the prompt" if both else "it begins with the prompt"
