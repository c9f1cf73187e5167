"""One parser for all commands: recipe keys and flags are the fields of dataclasses.

This is not argparse, which knows flags only: a key of a recipe and a flag go through one conversion
(see `tokenratio.settings`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tokenratio.errors import TokenRatioError
from tokenratio.settings import Field, allows, as_bool, check_known


def read_command(
    argv: list[str], usage: str, fields: Mapping[str, Field], *, argument: str | None
) -> tuple[str, dict[str, str | bool]] | None:
    """A command's one argument (or none, "" then) and its flags; None if help was asked and given.

    Args:
        usage: what `--help` prints before the list of settings.
        argument: what the argument is, for the message when it is missing.
    Raises:
        TokenRatioError: see `read_flags`; or another number of arguments.
    """
    if "--help" in argv or "-h" in argv:
        print(f"{usage}\n{describe(fields)}")
        return None
    positional, flags = read_flags(argv, fields)
    if argument is None and positional:
        raise TokenRatioError(f"this command takes no argument {positional[0]!r}")
    if argument is not None and len(positional) != 1:
        raise TokenRatioError(f"needs {argument}, and only that: {usage.splitlines()[0]}")
    return positional[0] if positional else "", flags


def read_flags(
    argv: list[str], fields: Mapping[str, Field]
) -> tuple[list[str], dict[str, str | bool]]:
    """Split a command line into positional arguments and flags.

    `--name value`, `--name=value` and, for a bool, `--name` alone; dashes and underscores are one.

    Raises:
        TokenRatioError: a flag that no field has, or one without its value.
    """
    positional: list[str] = []
    flags: dict[str, str | bool] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            positional.append(word)
            continue
        written, equals, value = word[2:].partition("=")
        name = written.replace("-", "_")
        if name not in fields:  # its value may tell which setting is meant
            check_known({name: value if equals else (rest or [None])[0]}, fields, "flag")
        if equals:
            flags[name] = value
        elif allows(fields[name].hint, bool) and not (rest and as_bool(rest[0]) is not None):
            flags[name] = True
        elif rest and not rest[0].startswith("--"):
            flags[name] = rest.pop(0)
        else:
            raise TokenRatioError(f"--{name} needs a value")
    return positional, flags


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        TokenRatioError: no such file, not YAML, or not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise TokenRatioError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TokenRatioError(f"cannot read {path}: it is not UTF-8 text") from None
    try:
        values = yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise TokenRatioError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise TokenRatioError(f"{path} must hold `key: value` lines")
    return {str(key): value for key, value in values.items()}


class _UniqueKeys(yaml.SafeLoader):
    """Safe loading that refuses a key written twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice")
        return super().construct_mapping(node, deep=deep)


def describe(fields: Mapping[str, Field]) -> str:
    """The settings, one a line, for `--help`."""
    lines = []
    for name, field in fields.items():
        default = f" [{field.default}]" if field.default not in ("", "None") else ""
        lines.append(f"  --{name}{default}\n      {field.help}" if field.help else f"  --{name}")
    return "\n".join(lines)
