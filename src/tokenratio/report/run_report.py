"""The report on runs and evaluations, as one page or as Markdown."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenratio.errors import TokenRatioError
from tokenratio.report.alarms import Alarm, alarms_of_policy, alarms_of_run
from tokenratio.report.artefacts import Artefacts, read_artefacts
from tokenratio.report.content import Report, Section
from tokenratio.report.curves import curve_figures, ends_table
from tokenratio.report.page import render_page, write_page
from tokenratio.report.policies import evaluation_sections
from tokenratio.report.summary import (
    data_section,
    facts_of,
    settings_section,
    verdict,
    versions_section,
)

# Loading, plotly.js adds a style for maps unless an element with its id is there; the policy would
# forbid it, with an error in the console.
_MAP_STYLE = re.compile(r'getElementById\("([0-9a-f]{64})"\)')
TEMPLATE, STYLES, SCRIPTS = "report.html.j2", ["report.css"], ["report.js"]


def write_report(runs: Sequence[str | Path], path: str | Path = "report.html") -> Path:
    """Write one self-contained page about runs and evaluations; returns its path.

    Args:
        runs: folders of runs and of evaluations, each may be `NAME=FOLDER`. Without an
            evaluation among them, those of the runs are looked for beside them.
        path: of the page; an existing file is replaced.
    Raises:
        TokenRatioError: a folder is neither; plotly is not installed; the page would be too large,
            or cannot be written.
    """
    path = Path(path)
    write_page(path, report_page(build_report(runs)))
    return path


def build_report(runs: Sequence[str | Path]) -> Report:
    """What the report says; see `write_report`."""
    found = read_artefacts(runs)
    main, others = curve_figures(found.runs)
    several = len(found.runs) > 1
    ends = ends_table(found.runs)
    evaluated, notes = evaluation_sections(found)
    sections = [
        Section("curves", "Training", figures=main),
        Section("ends", "From start to end", tables=[] if ends is None else [ends]),
        Section("more-curves", "More curves", figures=others, is_folded=True),
        *evaluated,
        data_section(found.runs),
        settings_section(found.runs),
        versions_section(found.runs),
    ]
    if several:  # what came out stands before how
        sections.sort(key=lambda section: section not in evaluated)
    missing = [*found.missing, *notes]
    missing += [f"{run.name}: {text}" for run in found.runs for text in run.missing]
    return Report(
        title=_title(found),
        verdict=_verdict(found),
        facts=facts_of(found.runs[0]) if len(found.runs) == 1 else _facts(found),
        alarms=_alarms(found),
        sections=[section for section in sections if section],
        missing=missing,
        unlogged=[run.name for run in found.runs if run.log is None],
    )


def report_page(report: Report, *, live: str | None = None) -> str:
    """The report as HTML.

    Args:
        live: the version of what it shows, if the page is to follow a run in progress.
    """
    plotly = _plotly() if report.figures else ""
    return render_page(
        TEMPLATE,
        title=report.title,
        data=page_data(report) | ({} if live is None else {"version": live}),
        styles=STYLES,
        scripts=SCRIPTS,
        libraries=[plotly] if plotly else [],
        live=live is not None,
        report=report,
        reserved=_MAP_STYLE.findall(plotly),
    )


def page_data(report: Report) -> dict[str, Any]:
    """What the page's script reads."""
    return {"figures": [figure.to_dict() for figure in report.figures]}


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise TokenRatioError(
            "the report's figures need plotly: pip install 'tokenratio[report]'"
        ) from None
    return str(get_plotlyjs())


def _title(found: Artefacts) -> str:
    if len(found.runs) == 1:
        return found.runs[0].name
    names = [run.name for run in found.runs] or [policy.name for policy in found.aligned]
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return shown or "Evaluation"


def _verdict(found: Artefacts) -> list[tuple[str, str]]:
    if len(found.runs) == 1:
        return [("", line) for line in verdict(found.runs[0], found)]
    lines = [(run.name, " ".join(verdict(run, found))) for run in found.runs]
    if not found.runs:
        lines.append(
            ("", f"Evaluated without runs: {', '.join(each.name for each in found.aligned)}.")
        )
    return lines


def _facts(found: Artefacts) -> list[tuple[str, str]]:
    return [
        (run.name, "; ".join(f"{name} {value}" for name, value in facts_of(run)[:2]))
        for run in found.runs
    ]


def _alarms(found: Artefacts) -> list[tuple[str, Alarm]]:
    alarms = [
        (run.name, each)
        for run in found.runs
        for each in alarms_of_run(run.log, run.config, run.held_out)
    ]
    reference = None if found.reference is None else found.reference.measures
    alarms += [
        (policy.name, each)
        for policy in found.aligned
        for each in alarms_of_policy(policy.measures, reference)
    ]
    together: dict[tuple[str, str], list[tuple[str, Alarm]]] = {}
    for about, alarm in alarms:
        together.setdefault((alarm.level, alarm.what), []).append((about, alarm))
    merged = [_merged(cases) for cases in together.values()]
    return sorted(merged, key=lambda alarm: alarm[1].level != "alarm")


def _merged(cases: Sequence[tuple[str, Alarm]]) -> tuple[str, Alarm]:
    """The same alarm of several runs as one."""
    if len(cases) == 1:
        return cases[0]
    text = "\n".join(f"{about}: {alarm.text}" for about, alarm in cases)
    advice = " ".join(dict.fromkeys(alarm.advice for _, alarm in cases))
    return ", ".join(about for about, _ in cases), replace(cases[0][1], text=text, advice=advice)
