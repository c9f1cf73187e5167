"""`tokenratio inspect-data SOURCE`: prints decoded rows with masks, lengths, cuts and defects."""

from dataclasses import dataclass
from typing import Any

from tokenratio.cli.command import Command
from tokenratio.models.template_options import TemplateOptions, template_of
from tokenratio.names import require_at_least
from tokenratio.settings import option

USAGE = """usage: tokenratio inspect-data SOURCE [--flag value ...]

SOURCE is a file, a folder, a hub name or a world. Without --tokenizer, lengths are in words.
`tokenratio inspect` shows pairs under a policy and its reference.
"""


@dataclass
class InspectDataOptions(TemplateOptions):
    """Options of `inspect-data`."""

    tokenizer: str | None = option(
        None, "The name of a model; rows are then shown as tokens with their masks."
    )
    num_rows: int = option(3, "Number of rows to print.")
    max_length: int | None = option(2048, "Maximum number of tokens in a row, as in training.")
    max_prompt_length: int | None = option(
        None, "Maximum number of tokens in a prompt, as in training."
    )
    split: str | None = option(
        None, "Split of a folder or hub data set. Default: the one that training reads."
    )
    columns: dict[str, Any] | None = option(
        None, "Columns of the data by tokenratio's names: '{prompt: ask, chosen: good}'."
    )

    def __post_init__(self) -> None:
        require_at_least(0, num_rows=self.num_rows)


def inspect_data(source: str, options: InspectDataOptions) -> None:
    """Print rows of a source and the report on its data."""
    from tokenratio.cli.terminal import quiet_libraries
    from tokenratio.data import inspect_source

    quiet_libraries()
    tokenizer = template = ends = None
    if options.tokenizer is not None:
        from tokenratio.models.loading import load_generation_ends, load_tokenizer

        tokenizer, template = template_of(
            options, load_tokenizer(options.tokenizer), options.tokenizer
        )
        ends = load_generation_ends(options.tokenizer)
    print(
        inspect_source(
            source,
            tokenizer,
            num_rows=options.num_rows,
            max_length=options.max_length,
            max_prompt_length=options.max_prompt_length,
            split=options.split,
            template=template,
            columns=options.columns,
            generation_ends=ends,
        )
    )


COMMAND = Command(USAGE, inspect_data, argument="one source", options=InspectDataOptions)
