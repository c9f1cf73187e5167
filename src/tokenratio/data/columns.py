"""Which columns of a source are read, and how: decided once per source, from all of its rows.

One row cannot show whether a text is JSON by accident, whether `label` is a verdict, or whether
other rows have a system prompt.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

from tokenratio.data.defects import DefectKind, RowDefectError
from tokenratio.data.display import printable
from tokenratio.data.files import SourceRow, unreadable_column
from tokenratio.data.layouts import (
    COMPLETIONS,
    HISTORY_COLUMN,
    LABEL_COLUMNS,
    PAIRS,
    PROMPTS,
    SYSTEM_COLUMNS,
    TEMPLATE_COLUMNS,
    Layout,
    Use,
    choose,
    clash_text,
    first_fit,
    holds_prompt,
    system_of,
    template_kwargs_of,
    tools_of,
    verdict,
)
from tokenratio.data.messages import (
    Message,
    Text,
    earlier_turns,
    is_broken_messages,
    is_envelope,
    messages_in,
    structured,
    text_or_messages,
    wrong_type,
)
from tokenratio.errors import TokenRatioError

# Our names, which `columns` maps to the source's.
COLUMN_NAMES = (
    *("prompt", "chosen", "rejected", "completion", "messages", "text"),
    *("system", "history", "tools", "chat_template_kwargs", "label"),
)
Columns: TypeAlias = Mapping[str, str | Sequence[str] | None]

# The share of a source's rows that makes what they have in common its layout.
NEARLY_ALL = 0.9
_MAYBE_MESSAGES = {name for layout in (*PROMPTS, *PAIRS, *COMPLETIONS) for name in layout.columns}


@dataclass(frozen=True)
class Parts:
    """What a row's columns hold, before the parts are fitted together.

    Attributes:
        prompt: None where the responses contain it.
        responses: chosen and rejected, or the completion alone.
        is_whole: the one response is a conversation; only its last turn is trained on.
        is_text: all of a text is trained on; there is no prompt.
        layout: in words.
        unread: columns that hold something but were not read.
    """

    prompt: Text | None
    responses: tuple[Text, ...]
    is_whole: bool
    is_text: bool
    system: str | None
    history: list[Message]
    tools: list[Any] | None
    template_kwargs: dict[str, Any]
    layout: str
    unread: tuple[str, ...]


@dataclass
class SourceColumns:
    """Reads the rows of one source; what their columns hold is decided once for all of them.

    Args:
        rows: all rows of the source.
        use: what is wanted of them.
        columns: our names (`COLUMN_NAMES`) to the source's, for a layout that is not known; a list
            of columns for `prompt` joins their texts with a blank line; null leaves a column out.
    Attributes:
        is_chat: whether a row has what only a conversation can have, such as a system prompt.
    Raises:
        TokenRatioError: `columns` is not a mapping, has an unknown name, or names a column that no
            row has.
    """

    rows: Sequence[SourceRow]
    use: Use
    columns: Columns | None = None

    def __post_init__(self) -> None:
        good = [row.fields for row in self.rows if row.problem is None]
        self._columns: Columns = self.columns or {}
        _check_columns(self._columns, good, self.rows)
        self._json = self._json_columns(good)
        fields = self.fields()
        self.is_chat = any(map(self._makes_chat, fields))
        self._label = self._label_column(fields)

    def fields(self) -> list[dict[str, Any]]:
        """The rows that could be read, under our names."""
        return [self._renamed(row.fields) for row in self.rows if row.problem is None]

    def parts(self, row: SourceRow) -> Parts:
        """Read one row; `RowDefectError` if a column is missing or holds the wrong type."""
        if row.problem is not None:
            raise RowDefectError(DefectKind.MALFORMED_ROW, row.problem)
        fields = self._decoded(self._renamed(row.fields))
        choice = choose(self.use, fields)
        if self.use == "prompt" and choice.prompt is None and not choice.clash:
            raise RowDefectError(DefectKind.MISSING_COLUMN, f"no prompt column; {_has(fields)}")
        if self.use != "prompt" and choice.responses is None:
            raise RowDefectError(DefectKind.MISSING_COLUMN, self._missing(fields))
        responses, prompt_layout = choice.responses, choice.prompt
        unreadable = unreadable_column(row, self._columns_read(fields, responses, prompt_layout))
        if unreadable is not None:
            raise RowDefectError(DefectKind.MALFORMED_ROW, unreadable)
        found = {} if responses is None else responses.read(fields)
        if prompt_layout is not None and prompt_layout.needs != ("prompt",) and holds_prompt(found):
            prompt_layout = None  # the conversations hold it
        elif choice.clash and not holds_prompt(found):
            raise RowDefectError(DefectKind.AMBIGUOUS_PROMPT, clash_text(choice.clash))
        if prompt_layout is not None:
            found = {**found, **prompt_layout.read(fields)}
        if self._reads_label(fields, responses) and not verdict(fields[str(self._label)]):
            raise RowDefectError(
                DefectKind.LABELLED_BAD,
                f"{self._label} is {json.dumps(fields[str(self._label)], default=str)}; only rows "
                "labelled good are trained on (columns: {label: null} ignores the label)",
            )
        read = self._columns_read(fields, responses, prompt_layout)
        is_text = "text" in found
        system = None if is_text else system_of(fields)
        history = []
        if not is_text and HISTORY_COLUMN not in (() if responses is None else responses.columns):
            history = earlier_turns(fields.get(HISTORY_COLUMN), HISTORY_COLUMN)
        prompt = text_or_messages(found["prompt"], "prompt") if "prompt" in found else None
        return Parts(
            responses=self._responses(found, prompt),
            prompt="" if is_text else prompt,
            is_whole="messages" in found and self.use == "completion",
            is_text=is_text,
            system=system,
            history=history,
            tools=tools_of(fields),
            template_kwargs=template_kwargs_of(fields),
            layout=self._label_of(responses, prompt_layout, fields),
            unread=tuple(k for k, v in row.fields.items() if v is not None and k not in read),
        )

    def _responses(self, found: Mapping[str, Any], prompt: Text | None) -> tuple[Text, ...]:
        if self.use == "prompt":
            return ()
        if self.use == "pair":
            return tuple(text_or_messages(found[name], name) for name in ("chosen", "rejected"))
        name = next(n for n in ("completion", "messages", "text", "chosen") if n in found)
        text = text_or_messages(found[name], name)
        if name == "text" and not isinstance(text, str):
            detail = "text is a list; call the column messages"
            raise RowDefectError(DefectKind.NON_STRING_FIELD, detail)
        if name == "messages" and isinstance(text, str):
            raise wrong_type(name, text, "a list of messages", DefectKind.MIXED_FORMAT)
        # If the responses contain the prompt, comparing both shows where it ends.
        needs_both = prompt is None or (isinstance(prompt, str) and not isinstance(text, str))
        if name == "chosen" and "rejected" in found and needs_both:
            return text, text_or_messages(found["rejected"], "rejected")
        return (text,)

    def _renamed(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        taken = {name for value in self._columns.values() for name in _names(value)}
        renamed = {k: v for k, v in fields.items() if k not in taken and k not in self._columns}
        for ours, value in self._columns.items():
            names = _names(value)
            if names and all(name in fields for name in names):
                values = [fields[name] for name in names]
                renamed[ours] = values[0] if isinstance(value, str) else _joined(values, names)
        return renamed

    def _json_columns(self, rows: Iterable[Mapping[str, Any]]) -> set[str]:
        """The columns whose texts are mostly messages as JSON or as Python literals."""
        ours = {name: key for key, value in self._columns.items() for name in _names(value)}
        texts: Counter[str] = Counter()
        messages: Counter[str] = Counter()
        for fields in rows:
            for name, value in fields.items():
                if isinstance(value, str) and value and name in _MAYBE_MESSAGES | ours.keys():
                    texts[name] += 1
                    messages[name] += messages_in(value) is not None or is_broken_messages(value)
        return {ours.get(name, name) for name in messages if 2 * messages[name] > texts[name]}

    def _decoded(self, fields: dict[str, Any]) -> dict[str, Any]:
        for name in self._json & fields.keys():
            value = fields[name]
            if isinstance(value, str) and value:
                if messages_in(value) is None:
                    detail = f"{name} holds messages as JSON text in most rows, but not in this one"
                    raise RowDefectError(DefectKind.MALFORMED_ROW, detail)
                fields[name] = structured(value)
        for name in _MAYBE_MESSAGES & fields.keys():
            envelope = fields[name]
            if is_envelope(envelope):
                fields[name] = envelope["messages"]
                if not fields.get("tools"):
                    fields["tools"] = envelope.get("tools")
        return fields

    def _makes_chat(self, fields: Mapping[str, Any]) -> bool:
        if any(fields.get(name) for name in TEMPLATE_COLUMNS):
            return True
        names = {*SYSTEM_COLUMNS, HISTORY_COLUMN} & fields.keys()
        pair = first_fit(PAIRS, fields)
        return bool(names - set(() if pair is None else pair.columns))

    def _label_column(self, rows: Sequence[Mapping[str, Any]]) -> str | None:
        """The column with a verdict on each completion, if nearly all its values are verdicts."""
        if self.use != "completion":
            return None
        for name in LABEL_COLUMNS:
            values = [row[name] for row in rows if row.get(name) not in (None, "")]
            known = sum(verdict(value) is not None for value in values)
            if values and known >= NEARLY_ALL * len(values):
                return name
        return None

    def _reads_label(self, fields: Mapping[str, Any], responses: Layout | None) -> bool:
        if responses is None or responses.use != "completion":
            return False
        return self._label in fields and not {*responses.needs} & {"text", "chosen"}

    def _columns_read(
        self, fields: Mapping[str, Any], responses: Layout | None, prompt: Layout | None
    ) -> set[str]:
        """The source's names of the columns that a row is read from."""
        layouts = [layout for layout in (responses, prompt) if layout is not None]
        read = {name for layout in layouts for name in layout.columns} | {*TEMPLATE_COLUMNS}
        if not any(layout.needs == ("text",) for layout in layouts):
            read |= {HISTORY_COLUMN, *[n for n in SYSTEM_COLUMNS if n in fields][:1]}
        if self._reads_label(fields, responses):
            read.add(str(self._label))
        if responses is not None and responses.needs == ("chosen",):
            read.add("rejected")
        mapped = {n for ours in read & self._columns.keys() for n in _names(self._columns[ours])}
        return (read - self._columns.keys()) | mapped

    def _label_of(
        self, responses: Layout | None, prompt: Layout | None, fields: Mapping[str, Any]
    ) -> str:
        """The layout in words: `prompt from question, with system; pair from chosen, rejected`."""
        consumed = () if responses is None else responses.columns
        extras = [
            name
            for name in (*SYSTEM_COLUMNS, HISTORY_COLUMN, "tools")
            if fields.get(name) and name not in consumed
        ]
        if prompt is not None:
            text = self._part("prompt", prompt)
        elif responses is None or responses.use == "completion":
            text = ""
        elif "prompt" in responses.note:
            text = "prompt and "
        else:
            text = "prompt from the beginning of both responses"
        text += f", with {', '.join(extras)}" if extras else ""
        if responses is None:
            return text
        joint = "; " if text and not text.endswith("and ") else ""
        return text + joint + self._part(responses.use, responses)

    def _part(self, use: str, layout: Layout) -> str:
        names = [" + ".join(_names(self._columns.get(name, name))) for name in layout.needs]
        if names == [use]:
            return use
        return f"{use} from {', '.join(names)}" + (f" ({layout.note})" if layout.note else "")

    def _missing(self, fields: Mapping[str, Any]) -> str:
        if self.use == "completion":
            wanted = "prompt and completion, text, messages, or prompt, chosen and rejected"
            return f"it needs {wanted}; {_has(fields)}"
        missing = [name for name in ("chosen", "rejected") if name not in fields]
        text = f"no {' and no '.join(missing)}; {_has(fields)}"
        if "completion" in fields and {*LABEL_COLUMNS} & fields.keys():
            text += "; unpaired rows with a label are only for loss: sft"
        return text


def _check_columns(
    columns: Columns, rows: Sequence[Mapping[str, Any]], sources: Sequence[SourceRow]
) -> None:
    def refuse(fault: str) -> NoReturn:
        raise TokenRatioError(printable(f"columns{fault}."))

    if not isinstance(columns, Mapping):
        refuse(f" must map names, such as {{prompt: ask}}, not {columns!r}")
    there = list(dict.fromkeys(name for fields in rows for name in fields))
    for ours, value in columns.items():
        if ours not in COLUMN_NAMES:
            refuse(f": {ours!r} cannot be mapped; known: {', '.join(COLUMN_NAMES)}")
        is_list = isinstance(value, list | tuple) and ours == "prompt"
        if not (value is None or isinstance(value, str) or is_list):
            refuse(f": {ours} must be the name of a column or null, not {value!r}")
        for name in _names(value):
            if rows and name not in there:
                source = sources[0].origin.rpartition(":")[0]
                refuse(f": {source} has no column {name!r} (for {ours}); it has {', '.join(there)}")


def _has(fields: Mapping[str, Any]) -> str:
    return f"it has {', '.join(sorted(fields)) or 'no column'}"


def _names(value: "str | Sequence[str] | None") -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def _joined(values: Sequence[Any], names: Sequence[str]) -> Any:
    texts = [value for value in values if value is not None and value != ""]
    if not all(isinstance(text, str) for text in texts):
        detail = f"{' and '.join(names)} are not all strings"
        raise RowDefectError(DefectKind.NON_STRING_FIELD, detail)
    return "\n\n".join(texts)
