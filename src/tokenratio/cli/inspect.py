"""`tokenratio inspect MODEL ...`: preference pairs token by token, under policy and reference."""

from pathlib import Path

from tokenratio.cli.command import Command
from tokenratio.report.credit_options import InspectOptions

USAGE = """usage: tokenratio inspect MODEL ... [--reference MODEL] [--data PAIRS] [--flag value ...]

Shows what a policy and its reference make of preference pairs, token by token, in a page that opens
in any browser: log-ratios, the ratio and state weight of each step, losses of several methods on
the same pair, KL, and what else was likely. MODEL is a run, a checkpoint, another model's folder,
an adapter, a GGUF file, a hub name or package:smollm2; NAME=MODEL names it. A run knows its
reference and data. Several models, such as checkpoints of a run, are a switch in the page.

`tokenratio inspect-data` shows a data set alone, without a model.
"""


def inspect(models: list[str], options: InspectOptions) -> None:
    """Write the page, or print the pairs."""
    from tokenratio.report.credit_places import require_places

    page, jsonl = Path(options.output), options.jsonl
    require_places(
        None if options.terminal else page,
        None if jsonl is None else Path(jsonl),
        data=options.data,
    )
    from tokenratio.cli.terminal import quiet_libraries
    from tokenratio.models.device import describe_device
    from tokenratio.report.credit import inspect_pairs
    from tokenratio.report.credit_page import write_credit_page
    from tokenratio.report.credit_terminal import terminal_lanes

    quiet_libraries()
    print(f"device: {describe_device()}")
    inspection = inspect_pairs(models, options)
    for note in inspection.notes:
        print(note)
    if jsonl is not None:
        inspection.write_jsonl(jsonl)
        print(f"figures: {jsonl}")
    if options.terminal:
        for line in terminal_lanes(inspection):
            print(line)
        return
    for note in write_credit_page(inspection, page):
        print(note)
    print(f"page: {page} ({page.stat().st_size / 1e6:.1f} MB)")


COMMAND = Command(
    USAGE, inspect, argument="at least one model", several=True, options=InspectOptions
)
