"""One command of `tokenratio`: its help, its arguments and flags, and the work it starts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenratio.cli.arguments import describe, read_flags
from tokenratio.errors import TokenRatioError
from tokenratio.settings import Field, build, fields_of


@dataclass(frozen=True)
class Command:
    """What stands between a command line and the function that does the work.

    Attributes:
        usage: what `--help` prints above the flags; starts with `usage: tokenratio NAME`.
        work: the function. Its arguments are the positional argument (a list if `several`; none
            without `argument`), then an instance of each class in `options` or, with `fields`, the
            flags as a dict. It returns the exit code; None is 0. It imports slow libraries itself,
            so that help and usage errors come at once.
        argument: what the positional arguments must be, for the message; "" if there are none.
        several, least: whether there may be more than one, and how many there must be at least.
        options: dataclasses whose fields are the flags (see `tokenratio.settings.option`).
        fields: returns the flags, for a command that reads them together with a recipe's keys.
        headings: the flags that `--help` lists first, by heading; `--help all` lists all.
    """

    usage: str
    work: Callable[..., int | None]
    argument: str = ""
    several: bool = False
    least: int = 1
    options: tuple[type[Any], ...] = ()
    fields: Callable[[], Mapping[str, Field]] | None = None
    headings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As in `tokenratio NAME`."""
        return self.usage.split(maxsplit=3)[2]

    def run(self, argv: list[str]) -> int:
        """Print help, or read the command line and do the work.

        Returns:
            The exit code.
        Raises:
            TokenRatioError: see `read_flags`; the wrong number of arguments; a value that an
                options class refuses; or what the work raises.
        """
        fields = fields_of(*self.options) if self.fields is None else self.fields()
        if "--help" in argv or "-h" in argv:
            print(f"{self.usage}\n{describe(fields, {} if 'all' in argv else self.headings)}")
            return 0
        positional, flags = read_flags(argv, fields)
        arguments = self._checked(positional)
        if self.fields is not None:
            return self.work(*arguments, flags) or 0
        options = [
            build(cls, {name: flags[name] for name in fields_of(cls) if name in flags}, self.name)
            for cls in self.options
        ]
        return self.work(*arguments, *options) or 0

    def _checked(self, positional: list[str]) -> list[Any]:
        """The positional arguments as the work takes them."""
        if not self.argument:
            if positional:
                raise TokenRatioError(f"{self.name} takes no argument: remove {positional[0]!r}")
            return []
        if len(positional) < self.least or (len(positional) > 1 and not self.several):
            synopsis = self.usage.partition("\n")[0]
            raise TokenRatioError(f"{self.name} needs {self.argument}: {synopsis}")
        return [positional] if self.several else positional
