"""A command of `tokenratio`: its help, its arguments and flags, and the function that it calls.

Not argparse: recipe keys and flags go through the same conversion (see `tokenratio.settings`).
"""

import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenratio.errors import TokenRatioError
from tokenratio.masking import is_secret
from tokenratio.models.template_options import TEMPLATE_FLAGS
from tokenratio.settings import Field, allows, as_bool, build, check_known, fields_of


@dataclass(frozen=True)
class Command:
    """A command's help text, flags and function.

    Attributes:
        usage: what `--help` prints above the flags; starts with `usage: tokenratio NAME`.
        work: the function; returns the exit code, or None for 0. It is called with the positional
            argument (a list if `several`; none without `argument`), then an instance of `options`
            or, with `fields`, the flags as a dict. It imports slow libraries itself, so that help
            and usage errors come at once.
        argument: what the positional arguments must be, for the message; "" if there are none.
        several, least: whether there may be more than one, and how many there must be at least.
        options: a dataclass whose fields are the flags (see `tokenratio.settings.option`).
        fields: returns the flags, for a command without `options` that reads them itself.
        headings: the flags that `--help` lists, by heading; `--help all` lists all.
    """

    usage: str
    work: Callable[..., int | None]
    argument: str = ""
    several: bool = False
    least: int = 1
    options: type[Any] | None = None
    fields: Callable[[], Mapping[str, Field]] = dict
    headings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def run(self, argv: list[str]) -> int:
        """Print help, or read the command line and do the work; returns the exit code."""
        fields = self.fields() if self.options is None else fields_of(self.options)
        if "--help" in argv or "-h" in argv:
            print(f"{self.usage}\n{describe_flags(fields, {} if 'all' in argv else self.headings)}")
            return 0
        name = self.usage.split(maxsplit=3)[2]
        positional, flags = read_flags(argv, fields)
        if not self.argument and positional:
            raise TokenRatioError(f"{name} takes no argument: remove {positional[0]!r}")
        if self.argument and (
            len(positional) < self.least or (len(positional) > 1 and not self.several)
        ):
            synopsis = self.usage.partition("\n")[0]
            raise TokenRatioError(f"{name} needs {self.argument}: {synopsis}")
        arguments = [positional] if self.several else positional
        for flag in filter(is_secret, flags):
            print(
                f"tokenratio: every user of this machine can read --{flag} in the list of its "
                "processes: use an environment variable such as HF_TOKEN, or the recipe",
                file=sys.stderr,
            )
        options = flags if self.options is None else build(self.options, flags, name)
        return self.work(*arguments, options) or 0


def read_flags(
    argv: list[str], fields: Mapping[str, Field]
) -> tuple[list[str], dict[str, str | bool]]:
    """Split a command line into positional arguments and flags.

    Accepts `--name value`, `--name=value` and, for a bool, `--name` alone; dashes and underscores
    are equivalent. An unknown flag or one without a value raises `TokenRatioError`.
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
        if name not in fields:  # its value can improve the suggestion
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


def describe_flags(fields: Mapping[str, Field], headings: Mapping[str, Sequence[str]]) -> str:
    """The settings with their defaults and help, as `--help` lists them.

    Args:
        headings: names of settings by heading: only these are listed, then how many others there
            are. If empty, all settings are listed, those of the chat template last.
    """
    if not headings:
        names = sorted(fields, key=lambda name: name in TEMPLATE_FLAGS)
        return "\n".join(_line(name, fields[name]) for name in names)
    blocks, num_listed = [], 0
    for heading, names in headings.items():
        lines = [_line(name, fields[name]) for name in names if name in fields]
        if lines:
            blocks.append("\n".join([f"{heading}:", *lines]))
            num_listed += len(lines)
    others = len(fields) - num_listed
    blocks.append(f"`--help all` also lists {others} more settings of transformers.")
    return "\n\n".join(blocks)


def _line(name: str, field: Field) -> str:
    default = f" [{field.default}]" if field.default not in ("", "None") else ""
    indent = " " * 6
    help_text = field.help.replace("%%", "%")  # transformers' texts are escaped for argparse
    text = textwrap.fill(help_text, 100, initial_indent=indent, subsequent_indent=indent)
    return f"  --{name}{default}" + (f"\n{text}" if field.help else "")
