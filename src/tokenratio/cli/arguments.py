"""One parser for all commands: recipe keys and flags are the fields of dataclasses.

Not argparse, which handles flags only: recipe keys and flags go through the same conversion (see
`tokenratio.settings`).
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tokenratio.errors import TokenRatioError
from tokenratio.settings import Field, allows, as_bool, check_known


def read_flags(
    argv: list[str], fields: Mapping[str, Field]
) -> tuple[list[str], dict[str, str | bool]]:
    """Split a command line into positional arguments and flags.

    Accepts `--name value`, `--name=value` and, for a bool, `--name` alone; dashes and underscores
    are equivalent.

    Raises:
        TokenRatioError: an unknown flag, or a flag without a value.
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
        if name not in fields:  # its value can help to suggest the right one
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
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice")
        return super().construct_mapping(node, deep=deep)


def describe(
    fields: Mapping[str, Field], headings: Mapping[str, Sequence[str]] | None = None
) -> str:
    """The settings with their defaults and help, as `--help` lists them.

    Args:
        headings: names of settings by heading: only these are listed, and how many others there
            are; all settings without headings if it is empty.
    """
    if not headings:
        return "\n".join(_line(name, field) for name, field in fields.items())
    groups = {
        heading: [name for name in names if name in fields] for heading, names in headings.items()
    }
    blocks = [
        "\n".join([f"{heading}:", *(_line(name, fields[name]) for name in names)])
        for heading, names in groups.items()
        if names
    ]
    others = len(fields) - sum(map(len, groups.values()))
    blocks.append(f"`--help all` lists all settings, {others} more of transformers included.")
    return "\n\n".join(blocks)


def _line(name: str, field: Field) -> str:
    default = f" [{field.default}]" if field.default not in ("", "None") else ""
    indent = " " * 6
    text = textwrap.fill(field.help, 100, initial_indent=indent, subsequent_indent=indent)
    return f"  --{name}{default}" + (f"\n{text}" if field.help else "")
