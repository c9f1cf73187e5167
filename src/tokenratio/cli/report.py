"""`tokenratio report RUN ...`: one page about runs and their evaluations."""

from dataclasses import dataclass
from pathlib import Path

from tokenratio.cli.command import Command
from tokenratio.errors import TokenRatioError
from tokenratio.names import require_choice
from tokenratio.settings import option

USAGE = """usage: tokenratio report RUN ... [--flag value ...]

Writes one self-contained page: verdict, alarms, curves, evaluation, answers, data and settings.
Several runs are compared. RUN is a run's folder, NAME=FOLDER, or a folder that `tokenratio
evaluate` wrote; without one, evaluations of the runs are looked for beside them. It reads files
only, also those of a run in progress, which --watch shows as it goes on.
"""
_FORMATS = ("html", "md", "png", "svg")


@dataclass(frozen=True)
class ReportOptions:
    """Settings of `report`."""

    output: str | None = option(
        None, "File to write, or folder of the images. Default: report.html, report.md or report."
    )
    format: str = option(
        "html",
        "html; md, tables for a pull request; png or svg, the figures as images (needs Chrome or "
        "Chromium).",
        choices=_FORMATS,
    )
    watch: bool = option(False, "Show a run in progress at an address of this machine.")
    port: int = option(8765, "Port of --watch; 0 takes a free one.")

    def __post_init__(self) -> None:
        require_choice("format", self.format, _FORMATS)
        if self.watch and (self.output is not None or self.format != "html"):
            raise TokenRatioError("--watch writes no file: leave out --output and --format")
        if not 0 <= self.port < 2**16:
            raise TokenRatioError(f"port must lie between 0 and 65535, not {self.port}")


def report(runs: list[str], options: ReportOptions) -> None:
    """Write the report, or show it until Ctrl-C."""
    from tokenratio.cli.terminal import quiet_libraries
    from tokenratio.report.run_report import build_report, write_report

    quiet_libraries()
    if options.watch:
        from tokenratio.report.live import watch

        watch(runs, options.port)
        return
    images = options.format in ("png", "svg")
    path = Path(options.output or ("report" if images else f"report.{options.format}"))
    if options.format == "html":
        write_report(runs, path)
    elif options.format == "md":
        from tokenratio.report.as_markdown import write_markdown

        write_markdown(build_report(runs), path)
    else:
        from tokenratio.report.images import write_images

        written = write_images(build_report(runs).figures, path, options.format)
        print(*written, sep="\n")
        return
    print(path)


COMMAND = Command(
    USAGE,
    report,
    argument="one or more runs",
    several=True,
    options=ReportOptions,
)
