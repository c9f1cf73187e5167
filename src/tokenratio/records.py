"""JSON read into declared shapes; what is missing or of the wrong kind is named by file and field.

A shape is a dataclass, a `TypedDict`, or any type made of these and plain ones. Every file of ours
that is read back goes through `read_record` or, line by line, through `as_shape`.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from datetime import date
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from tokenratio.errors import TokenRatioError

Shape = TypeVar("Shape")

# Deeper values end in a RecursionError somewhere: in templates, in copies, in JSON itself.
MAX_DEPTH = 100
# Whole numbers that cannot become floats.
_TOO_LARGE = 10**300
_TOO_DEEP = f"it is nested more than {MAX_DEPTH} levels deep"


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        ValueError: it is not JSON, an object has a key twice (of which Python would keep the last),
            or it is nested more than `MAX_DEPTH` levels deep.
    """
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    # Most texts have too few brackets to be deep.
    if text.count("[") + text.count("{") > MAX_DEPTH and (fault := structure_fault(value)):
        raise ValueError(fault)
    return value


def repeated_key(pairs: Sequence[tuple[str, Any]]) -> str:
    """The message about an object that has a key twice."""
    seen = set()
    key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return f"the key {key!r:.80} is given twice"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(repeated_key(pairs))
    return found


def structure_fault(value: object) -> str | None:
    """Why a value cannot be one of JSON: a key that is not text, or too many levels; else None.

    >>> structure_fault({"a": [{1: "b"}]})
    'the key 1 is not text'
    """
    level = [value] if isinstance(value, dict | list | tuple) else []
    for _ in range(MAX_DEPTH):
        below: dict[int, Any] = {}  # each container once: Python's may refer to one another
        for each in level:
            children: Any = each
            if isinstance(each, dict):
                for key in each:
                    if not isinstance(key, str):
                        return f"the key {key!r:.80} is not text"
                children = each.values()
            for child in children:
                if isinstance(child, dict | list | tuple) and child:
                    below[id(child)] = child
        if not below:
            return None
        level = list(below.values())
    return _TOO_DEEP


def read_record(shape: type[Shape], path: str | Path, remedy: str = "") -> Shape:
    """The content of a JSON file of this shape.

    Args:
        remedy: what to do about a file that cannot be used, for the message.
    Raises:
        TokenRatioError: the file cannot be read, is not JSON, or has another shape.
    """
    end = f"; {remedy}" if remedy else ""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise TokenRatioError(f"cannot read {path}: {error.strerror}{end}") from None
    try:
        value = parse_json(content)
    except ValueError as error:
        raise TokenRatioError(f"{path}: not JSON: {error}{end}") from None
    return as_shape(shape, value, str(path), remedy)


def as_shape(
    shape: type[Shape], value: Any, where: str, remedy: str = "", *, name: str = ""
) -> Shape:
    """A JSON value as its shape; unknown fields of a dataclass are left out.

    Args:
        where: the file, and the line if it has many records.
        remedy: see `read_record`.
        name: of the field that holds the value; empty for the whole record.
    Raises:
        TokenRatioError: a field is missing or of the wrong kind; names it.
    """
    try:
        return typing.cast(Shape, _read(shape, value, name))
    except _FaultError as fault:
        raise TokenRatioError(f"{where}: {fault}" + (f"; {remedy}" if remedy else "")) from None


class _FaultError(Exception):
    """A value that does not have its shape."""


def _read(hint: Any, value: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Required, typing.NotRequired):
        return _read(arguments[0], value, name)
    if origin in (Union, types.UnionType):
        return _one_of(arguments, value, name)
    if hint is Any:
        return value
    if origin is Literal:
        if not any(type(value) is type(each) and value == each for each in arguments):
            raise _wrong(hint, value, name)
        return value
    if origin is tuple and arguments[-1:] != (Ellipsis,):
        items = _items(hint, value, name)
        if len(items) != len(arguments):
            raise _FaultError(f"{_called(name)} has {len(items)} items, not {len(arguments)}")
        each = zip(arguments, items, strict=True)
        return tuple(_read(a, item, f"{name}[{i}]") for i, (a, item) in enumerate(each))
    if isinstance(origin or hint, type):
        return _read_type(hint, origin or hint, arguments, value, name)
    raise TypeError(f"{hint} cannot be read from JSON")


def _read_type(hint: Any, kind: type, arguments: tuple[Any, ...], value: Any, name: str) -> Any:
    if typing.is_typeddict(kind) or dataclasses.is_dataclass(kind):
        return _fields(kind, value, name)
    if issubclass(kind, Enum | date):
        try:
            return date.fromisoformat(value) if kind is date else kind(value)
        except (ValueError, TypeError):
            raise _wrong(hint, value, name) from None
    if issubclass(kind, Mapping):
        key, item = arguments or (Any, Any)
        pairs = value.items() if isinstance(value, Mapping) else value
        # An object's keys are texts; others are kept as a list of pairs.
        is_pairs = isinstance(value, list) and key is not str
        if is_pairs and all(isinstance(each, list) and len(each) == 2 for each in value):
            return {_read(key, k, name): _read(item, v, f"{name}[{k}]") for k, v in pairs}
        if not isinstance(value, Mapping):
            raise _wrong(hint, value, name)
        return {
            k if key in (str, Any) else _read(key, k, name): _read(
                item, v, f"{name}.{k}".lstrip(".")
            )
            for k, v in pairs
        }
    if issubclass(kind, Sequence) and not issubclass(kind, str):
        item = arguments[0] if arguments else Any
        found = [_read(item, v, f"{name}[{i}]") for i, v in enumerate(_items(hint, value, name))]
        return tuple(found) if kind is tuple else found
    return _plain(kind, value, name)


def _plain(kind: type, value: Any, name: str) -> Any:
    if kind is float and type(value) in (int, float):
        try:
            return float(value)
        except OverflowError:
            raise _FaultError(f"{_called(name)} is too large a number") from None
    if type(value) is kind and not (kind is int and abs(value) >= _TOO_LARGE):
        return value
    raise _wrong(kind, value, name)


def _one_of(options: Sequence[Any], value: Any, name: str) -> Any:
    """The value as the first of several types that it fits."""
    if value is None and types.NoneType in options:
        return None
    others = [option for option in options if option is not types.NoneType]
    for option in others:
        try:
            return _read(option, value, name)
        except _FaultError as fault:
            if len(others) == 1 and isinstance(value, Mapping | list):
                raise fault from None  # which names the field inside
    raise _FaultError(_not(value, name, " or ".join(map(_in_words, options))))


def _fields(kind: type, value: Any, name: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(kind, value, name)
    hints, required = _hints(kind)
    found = {}
    for field, hint in hints.items():
        if field in value:
            found[field] = _read(hint, value[field], f"{name}.{field}".lstrip("."))
        elif field in required:
            raise _FaultError(f"{f'{name} has ' if name else ''}no field {field!r}")
    if typing.is_typeddict(kind):
        return {**value, **found}
    try:
        return kind(**found)
    except TokenRatioError as error:  # a value that the class refuses
        raise _FaultError(f"{name}: {error}" if name else str(error)) from None


@cache
def _hints(kind: type) -> tuple[dict[str, Any], frozenset[str]]:
    """The types of a shape's fields, and those that must be there."""
    hints = typing.get_type_hints(kind)
    if typing.is_typeddict(kind):
        return hints, frozenset(kind.__required_keys__)  # type: ignore[attr-defined]
    fields = [field for field in dataclasses.fields(kind) if field.init]
    required = frozenset(
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    )
    return {field.name: hints[field.name] for field in fields}, required


def _items(hint: Any, value: Any, name: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise _wrong(hint, value, name)
    return list(value)


def _wrong(hint: Any, value: Any, name: str) -> _FaultError:
    return _FaultError(_not(value, name, _in_words(hint)))


def _not(value: Any, name: str, wanted: str) -> str:
    shown = kind_of(value)
    is_short = isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 2**64)
    if is_short and not isinstance(value, bool) and len(repr(value)) <= 40:
        shown = repr(value)
    return f"{_called(name)} is {shown}, not {wanted}"


def _called(name: str) -> str:
    return name if name else "it"


def _in_words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_in_words, arguments)))
    if origin is Literal:
        names = ", ".join(map(str, arguments))
        return f"one of {names}" if len(arguments) > 1 else names
    kind = origin or hint
    if kind is types.NoneType:
        return "null"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    if kind in words:
        return words[kind]
    if typing.is_typeddict(kind) or dataclasses.is_dataclass(kind) or issubclass(kind, Mapping):
        return "an object"
    if issubclass(kind, Enum):
        return f"one of {', '.join(str(each.value) for each in kind)}"
    return "a date" if kind is date else "a list"


def kind_of(value: object) -> str:
    """The kind of a value, for messages.

    >>> kind_of(None), kind_of(3), kind_of(["a"])
    ('null', 'a number', 'a list')
    """
    if value is None:
        return "null"
    kinds: tuple[tuple[Any, str], ...] = (
        *((bool, "true or false"), (int | float, "a number"), (str, "a string")),
        *((Mapping, "an object"), (list | tuple, "a list")),
    )
    return next((name for kind, name in kinds if isinstance(value, kind)), "another kind of value")
