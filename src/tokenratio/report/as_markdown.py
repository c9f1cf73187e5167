"""The report as Markdown, short enough for a pull request."""

from pathlib import Path

from tokenratio.errors import reported_as
from tokenratio.markdown import markdown_table, markdown_text
from tokenratio.report.content import Report
from tokenratio.report.page import require_replaceable
from tokenratio.run_folder import replace_text

_MARK = "<!-- Written by tokenratio report. -->"


def report_markdown(report: Report) -> str:
    """Verdict, alarms and tables; figures, answers and what the page folds are left out."""
    blocks = [_MARK, f"## {markdown_text(report.title)}"]
    blocks += [
        (f"**{markdown_text(about)}** " if about else "") + markdown_text(line)
        for about, line in report.verdict
    ]
    blocks.append(
        "\n".join(
            f"- **{alarm.level.upper()}: {markdown_text(alarm.what)}** ({markdown_text(about)}). "
            f"{markdown_text(alarm.text)} {markdown_text(alarm.advice)}"
            for about, alarm in report.alarms
        )
        or markdown_text(report.calm)
    )
    blocks.append(markdown_table(("", ""), report.facts))
    for section in report.sections:
        if section.is_folded or not section.tables:
            continue
        blocks.append(f"### {markdown_text(section.title)}")
        for table in section.tables:
            blocks += [markdown_table(table.header, table.rows), markdown_text(table.caption)]
    if report.missing:
        blocks.append("\n".join(f"- {markdown_text(line)}" for line in report.missing))
    return "\n\n".join(filter(None, blocks)) + "\n"


def write_markdown(report: Report, path: Path) -> None:
    """Write the report; refuses to replace a file that is none."""
    require_replaceable(path, _MARK.encode())
    with reported_as(f"cannot write {path}", OSError):
        replace_text(path, report_markdown(report))
