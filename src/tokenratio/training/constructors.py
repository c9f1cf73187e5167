"""Errors for arguments that a class does not have, as for a recipe's misspelt keys."""

import functools
import inspect
import re
import typing
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, TypeVar

from transformers import Trainer

from tokenratio.errors import TokenRatioError
from tokenratio.foreign_names import advice_in_python
from tokenratio.names import near_names, require_choice, suggestion

Class = TypeVar("Class", bound=type)
# transformers' enumerations name a Python type instead of the setting when they refuse a value.
_NOT_A_CHOICE = re.compile(r"(.*) is not a valid \w+, please select one of \[(.*)\]", re.DOTALL)


def explain_settings(cls: Class) -> Class:
    """A dataclass of settings whose unknown arguments and wrong choices raise `TokenRatioError`."""
    return _with_constructor(cls, lambda name, value, known: advice_in_python(name, known, value))


def explain_arguments(settings: type) -> Callable[[Class], Class]:
    """As `explain_settings`, for a trainer; an argument of its settings is pointed there."""
    names = set(inspect.signature(settings).parameters)
    parts_of_trainer = set(inspect.signature(Trainer).parameters)

    def explain(name: str, value: Any, known: list[str]) -> str | None:
        if name == "tokenizer":
            return "use processing_class"
        if name in parts_of_trainer:
            return "it has its own"
        advice = advice_in_python(name, [*names, *known], value)
        ours = name if advice is None else advice.removeprefix("use ")
        if advice is None and name not in names and not near_names(name, known):
            ours = next(iter(near_names(name, names)), "")
        return f"use args={settings.__name__}({ours}=...)" if ours in names else advice

    return lambda cls: _with_constructor(cls, explain)


def _is_number(cls: type, name: str) -> bool:
    hint = typing.get_type_hints(cls).get(name) if is_dataclass(cls) else None
    return bool({hint, *typing.get_args(hint)} & {int, float})


def _with_constructor(cls: Class, explain: Callable[[str, Any, list[str]], str | None]) -> Class:
    construct = cls.__init__  # type: ignore[misc]
    known = [name for name in inspect.signature(construct).parameters if name != "self"]

    @functools.wraps(construct)
    def explained(self: Any, *args: Any, **kwargs: Any) -> None:
        for name, value in kwargs.items():
            if name not in known:
                advice = explain(name, value, known)
                hint = f": {advice}" if advice else suggestion(name, known)
                raise TokenRatioError(f"{cls.__name__} has no argument {name!r}{hint}")
        try:
            construct(self, *args, **kwargs)
        except TypeError as error:
            texts = [n for n, v in kwargs.items() if isinstance(v, str) and _is_number(cls, n)]
            if not texts:
                raise
            raise TokenRatioError(
                f"{texts[0]} must be a number, not {kwargs[texts[0]]!r}"
            ) from error
        except ValueError as error:
            found = _NOT_A_CHOICE.fullmatch(str(error))
            given = [n for n, v in kwargs.items() if found and str(v) == found[1]]
            if not found or not given:
                raise
            choices = [choice.strip(" '\"") for choice in found[2].split(",")]
            listed = "see the documentation of transformers.TrainingArguments"
            require_choice(given[0], found[1], choices, listed=listed)
            raise

    cls.__init__ = explained  # type: ignore[misc]
    return cls
