"""What a report says, whatever format shows it: figures, tables, answers and words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenratio.data.display import visible
from tokenratio.report.alarms import Alarm


@dataclass(frozen=True)
class Figure:
    """A figure of plotly.

    Attributes:
        name: its id in the page, and the name of its image.
        title: what is drawn, with the unit.
        traces: plotly's `data`; colours are of the palette, so that they suit both themes.
        layout: plotly's `layout` as far as it is the figure's own: axes, lines, annotations.
        note: below the figure.
    """

    name: str
    title: str
    traces: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The figure as JSON; plotly reads tags in texts, so those of names are escaped.

        Characters that are invisible, or would reorder the line, are written out.
        """
        content = {"data": list(self.traces), "layout": dict(self.layout)}
        return {"name": self.name, **escaped(content)}


@dataclass(frozen=True)
class Table:
    """A table of texts; all columns but the first hold numbers if `is_numeric`."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    is_numeric: bool = True


@dataclass(frozen=True)
class Answer:
    """A prompt and the responses to it: by policy, each with what is known of it in words."""

    id: str
    prompt: str
    responses: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Section:
    """A part of the report under one heading; `is_folded` ones are opened by the reader."""

    name: str
    title: str
    text: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    answers: Sequence[Answer] = ()
    is_folded: bool = False

    def __bool__(self) -> bool:
        return bool(self.figures or self.tables or self.answers)


@dataclass(frozen=True)
class Report:
    """The whole report.

    Attributes:
        title: what was trained or compared.
        verdict: how it went, in a few sentences; each with its run's name, if there are several.
        facts: names and values for the heading.
        alarms: each with the run or policy it is about.
        missing: what could not be shown, and why.
        unlogged: runs without a logged step, for which no alarm can sound.
    """

    title: str
    verdict: Sequence[tuple[str, str]]
    facts: Sequence[tuple[str, str]]
    alarms: Sequence[tuple[str, Alarm]]
    sections: Sequence[Section]
    missing: Sequence[str] = ()
    unlogged: Sequence[str] = ()

    @property
    def calm(self) -> str:
        """What is said if there are no alarms."""
        if not self.unlogged:
            return "No alarms."
        return f"No step is logged of {', '.join(self.unlogged)}: its alarms are not known."

    @property
    def figures(self) -> list[Figure]:
        """Those of all sections."""
        return [figure for section in self.sections for figure in section.figures]


def escaped(value: Any, key: str = "") -> Any:
    """The same value for plotly, which reads tags in its names and texts."""
    if isinstance(value, str) and key in ("name", "text"):
        return visible(value).replace("&", "&amp;").replace("<", "&lt;")
    if isinstance(value, Mapping):
        return {name: escaped(each, name) for name, each in value.items()}
    if isinstance(value, list | tuple):
        # Numbers are most of a figure, and as they are.
        return (
            [escaped(each, key) for each in value] if key in ("text", "data", "shapes") else value
        )
    return value
