"""Dataclasses to JSON values and back, without loss."""

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import date
from enum import Enum
from typing import Any


def to_json(value: Any) -> Any:
    """A value of dataclasses, mappings, sequences, dates and plain values as a JSON value."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: to_json(item) for key, item in value.items()}
        return [[key, to_json(item)] for key, item in value.items()]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_json(item) for item in value]
    return value


def from_json(hint: Any, value: Any) -> Any:
    """The value of type `hint` that `to_json` turned into `value`.

    Raises:
        TypeError, ValueError, LookupError: it is no such value.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _one_of(arguments, value)
    if is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return typing.cast(Any, hint)(
            **{name: from_json(hints[name], item) for name, item in value.items()}
        )
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    if hint is date:
        return date.fromisoformat(value)
    if origin is tuple:
        return tuple(from_json(arguments[0], item) for item in value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        pairs = value.items() if isinstance(value, Mapping) else value
        return {key: from_json(arguments[1], item) for key, item in pairs}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return [from_json(arguments[0], item) for item in value]
    return value


def _one_of(options: Sequence[Any], value: Any) -> Any:
    if value is None:
        return None
    for option in options:
        if option is types.NoneType:
            continue
        try:
            return from_json(option, value)
        except (TypeError, ValueError, LookupError, AttributeError):
            continue
    raise ValueError(f"{value!r} is none of {options}")
