"""`tokenratio convert FILE --to FORMAT`: converts from and to AlpacaEval and MT-Bench files."""

from dataclasses import dataclass
from typing import Literal

from tokenratio.cli.command import Command
from tokenratio.errors import TokenRatioError
from tokenratio.names import require_at_least
from tokenratio.settings import option

USAGE = """usage: tokenratio convert FILE --to generations|alpaca-eval|mt-bench --output FILE

FILE has one of three formats, recognised by its first record: generations of tokenratio (JSON
lines), AlpacaEval's model outputs (JSON), or FastChat's answers to MT-Bench (JSON lines).
"""
KINDS = ("generations", "alpaca-eval", "mt-bench")


@dataclass(frozen=True)
class ConvertOptions:
    """The options of `convert`."""

    to: Literal["generations", "alpaca-eval", "mt-bench"] = option(
        "", f"Output format: {', '.join(KINDS)}."
    )
    output: str = option("", "Output file.")
    generator: str | None = option(None, "Name of the model. Default: the one in FILE, if any.")
    questions: str | None = option(
        None,
        "File of the prompts and their ids: AlpacaEval's instructions or MT-Bench's "
        "question.jsonl. Required if FILE is from MT-Bench, whose answers lack the questions.",
    )
    turn: int = option(1, "Turn of MT-Bench's answers to convert.")
    overwrite: bool = option(False, "Replace an existing output.")

    def __post_init__(self) -> None:
        for name in ("to", "output"):
            if not getattr(self, name):
                raise TokenRatioError(f"convert needs --{name}")
        require_at_least(1, turn=self.turn)


def convert_file(path: str, options: ConvertOptions) -> None:
    """Convert one file and print what was written."""
    from tokenratio.cli.answer_files import convert

    print(convert(path, options))


COMMAND = Command(USAGE, convert_file, argument="one file", options=ConvertOptions)
