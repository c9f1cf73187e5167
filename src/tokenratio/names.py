"""Names and values: those given as `NAME=PATH`, and messages about those that are not valid."""

import difflib
import os
from collections.abc import Iterable

from tokenratio.errors import TokenRatioError

# Less similar names share letters by chance: `use_peft` and `use_cpu` have 0.67.
_NEAR = 0.75
_FEW = 5


def near_names(name: object, known: Iterable[str]) -> list[str]:
    """The known names closest to `name`, the nearest first.

    >>> near_names("TBPO-A", ["tbpo_a", "tbpo"])
    ['tbpo_a']
    """
    known = list(known)
    plain = str(name).lower().replace("-", "_")
    same = [each for each in known if each.lower().replace("-", "_") == plain]
    return same or difflib.get_close_matches(plain, known, n=3, cutoff=_NEAR)


def suggestion(name: object, known: Iterable[str], *, listed: str = "") -> str:
    """The end of a message about an unknown name: the near ones, or all if they are few.

    Args:
        listed: where many names are listed, in words; left out if empty.

    >>> suggestion("lerning_rate", ["learning_rate", "logging_steps"])
    "; did you mean 'learning_rate'?"
    >>> suggestion("use_peft", ["use_cpu", "seed"])
    '; known: use_cpu, seed'
    """
    known = list(known)
    near = near_names(name, known)
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    if len(known) <= _FEW:
        return f"; known: {', '.join(known)}"
    return f"; {listed}" if listed else ""


def split_name(given: str) -> tuple[str | None, str]:
    """`NAME=PATH` as both; a path alone, also an existing one with `=` in it, has no name.

    >>> split_name("dpo=runs/dpo"), split_name("runs/dpo")
    (('dpo', 'runs/dpo'), (None, 'runs/dpo'))
    """
    name, equals, path = given.partition("=")
    return (None, given) if not equals or os.path.exists(given) else (name, path)


def require_choice(name: str, value: object, choices: Iterable[str], *, listed: str = "") -> None:
    """Raise `TokenRatioError` for a value that is not a choice; it lists the valid or near ones."""
    choices = list(choices)
    if value in choices:
        return
    near = near_names(value, choices)
    if not near and isinstance(value, str) and value:
        near = [each for each in choices if each.startswith(value) or value.startswith(each)][:3]
    shown = "null" if value is None else repr(value)
    meant = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    if len(choices) > _FEW:
        raise TokenRatioError(f"unknown {name} {shown}{meant or (listed and f'; {listed}')}")
    raise TokenRatioError(f"{name} must be one of {', '.join(choices)}, not {shown}{meant}")


def require_at_least(least: int, **values: float | None) -> None:
    """Refuse a number below `least`; None is allowed."""
    for name, value in values.items():
        if value is not None and value < least:
            raise TokenRatioError(f"{name} must be at least {least}, not {value}")
