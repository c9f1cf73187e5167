"""Settings as dataclass fields, and their values from YAML, flags or Python.

A YAML value and a flag's text go through the same conversion to the field's type: `learning_rate:
5e-7`, which YAML reads as text, means what `--learning_rate 5e-7` means, and a misspelt name is an
error in either place.
"""

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from datetime import date
from enum import Enum
from typing import Any, TypeVar

from tokenratio.errors import TokenRatioError
from tokenratio.foreign_names import advice
from tokenratio.masking import shown_value
from tokenratio.names import require_choice, suggestion
from tokenratio.yaml_text import parse_yaml

Options = TypeVar("Options")


def option(default: Any, help: str, *, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field that is a setting: its default, and its line of `--help`."""
    metadata: dict[str, Any] = {"help": help}
    if choices:
        metadata["choices"] = choices
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Field:
    """One setting: its type, its default as text and what it does."""

    hint: Any
    default: str
    help: str


def fields_of(*classes: type) -> dict[str, Field]:
    """The settings of dataclasses, by name; if names repeat, the last class takes precedence."""
    fields = {}
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.init:
                default = "" if field.default is dataclasses.MISSING else str(field.default)
                text = " ".join(str(field.metadata.get("help", "")).split())
                fields[field.name] = Field(hints[field.name], default, text)
    return fields


def check_known(
    names: Iterable[str], known: Iterable[str], what: str, *, listed: str = "--help lists them"
) -> None:
    """Refuse unknown names, suggesting the right one where possible.

    Args:
        names: the given names; or a mapping to their values, which can help the suggestion.
        what: what the names are, for the message.
        listed: where to find all known names, if there are many.
    """
    known = list(known)
    for name in names:
        if name not in known:
            value = names[name] if isinstance(names, Mapping) else None
            found = advice(str(name), known, value)
            hint = f": {found}" if found else suggestion(name, known, listed=listed)
            raise TokenRatioError(f"unknown {what} {name!r}{hint}")


def convert(name: str, value: Any, field: Field) -> Any:
    """A YAML value or a flag's text as the field's type; `TokenRatioError` if it cannot be one."""
    options = typing.get_args(field.hint) if _is_union(field.hint) else (field.hint,)
    if value is None or (value in ("null", "None") and types.NoneType in options):
        return None
    for option in (bool, int, float, list, dict, Enum, str):
        for hint in options:
            if _origin(hint) is not option and not (option is Enum and _is_enum(hint)):
                continue
            converted = _CONVERTERS[option](value)
            if converted is not None:
                choices = _choices(options)
                if choices and isinstance(converted, str):
                    require_choice(name, converted, choices)
                return converted
    raise TokenRatioError(
        f"{name} must be {_in_words(options)}, not {shown_value(name, value):.200}"
    )


def build(cls: type[Options], values: Mapping[str, Any], where: str) -> Options:
    """An instance of the dataclass from recipe values or flags.

    Raises:
        TokenRatioError: an unknown name, a value of the wrong type, or one the class refuses.
    """
    fields = fields_of(cls)
    check_known(values, fields, f"key in {where}")
    converted = {name: convert(name, value, fields[name]) for name, value in values.items()}
    try:
        return cls(**converted)
    except TokenRatioError:
        raise
    except Exception as error:  # transformers checks its own fields, with errors of many kinds
        raise TokenRatioError(f"{where}: {error}") from error


def as_bool(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    return {"true": True, "yes": True, "false": False, "no": False}.get(str(value).lower())


def _as_int(value: Any) -> int | None:
    try:  # exactly: a float has only 53 bits
        if type(value) in (int, str):
            return int(value)
    except ValueError:
        pass
    number = _as_float(value)
    return int(number) if number is not None and number == int(number) else None


def _as_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if number - number == 0 else None  # neither infinite nor NaN


def _as_container(kind: type) -> Any:
    def converter(value: Any) -> Any:
        if isinstance(value, str):
            try:
                value = parse_yaml(value, "it")
            except TokenRatioError:
                return None
        return value if isinstance(value, kind) else None

    return converter


def _as_text(value: Any) -> str | None:
    if isinstance(value, bool):
        return str(value).lower()
    # YAML reads 2025-03-01 as a date.
    return str(value) if isinstance(value, str | int | float | date) else None


def _as_choice(value: Any) -> str | None:
    # `save_strategy: no` is false to YAML. transformers turns the text into its own enumeration.
    return "no" if value is False else _as_text(value)


_CONVERTERS: dict[Any, Any] = {
    bool: as_bool,
    int: _as_int,
    float: _as_float,
    list: _as_container(list),
    dict: _as_container(dict),
    Enum: _as_choice,
    str: _as_text,
}


_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "a mapping such as {key: value}",
    types.NoneType: "null",
}


def _in_words(options: Iterable[Any]) -> str:
    """The allowed types of a setting, without names of Python types."""
    origins = [_origin(option) for option in options]
    words = [_WORDS.get(origin, "text") for origin in origins]
    if float in origins:
        words = [word for word in words if word != _WORDS[int]]
    return " or ".join(dict.fromkeys(words))


def _choices(options: Iterable[Any]) -> list[str]:
    """The strings that enumerations and literals among the types allow."""
    choices: list[Any] = []
    for option in options:
        if _is_enum(option):
            choices += [member.value for member in option]
        elif typing.get_origin(option) is typing.Literal:
            choices += typing.get_args(option)
    return [choice for choice in choices if isinstance(choice, str)]


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _origin(hint: Any) -> Any:
    if typing.get_origin(hint) is typing.Literal:
        return str
    return typing.get_origin(hint) or hint


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def allows(hint: Any, kind: type) -> bool:
    return hint is kind or (_is_union(hint) and kind in typing.get_args(hint))
