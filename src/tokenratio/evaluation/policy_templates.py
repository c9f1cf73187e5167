"""The chat templates of an evaluation's policies: as each was trained, all on one day."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

from transformers import PreTrainedTokenizerBase

from tokenratio.data.template import TemplateSettings, depends_on_day
from tokenratio.evaluation.options import EvaluateOptions
from tokenratio.evaluation.subjects import Subject
from tokenratio.models.template_options import TEMPLATE_FLAGS, template_of
from tokenratio.run_folder import read_document, read_run_file, replace_text

_FILE = "template.json"


class PolicyTemplates:
    """Finds each policy's template settings, and records the day in the evaluation's folder.

    Attributes:
        day: that of the options, else of the folder, else of the first run with one, else today.
    """

    def __init__(
        self,
        subjects: Sequence[Subject],
        options: EvaluateOptions,
        report: Callable[[str], None],
    ) -> None:
        self._options, self._report = options, report
        self._path = Path(options.output_dir) / _FILE
        self._reported: set[str] = set()
        self._is_dated = False
        recorded = [subject for subject in subjects if subject.config]
        # A policy without a record, such as the reference, is rendered as the first run is.
        self._first = recorded[0].path if recorded else None
        days = [
            options.template_date,
            (read_document(self._path) or {}).get("template_date"),
            *(subject.config.get("template_date") for subject in recorded),
        ]
        self.day: str = next(filter(None, days), TemplateSettings().day.isoformat())

    @property
    def written_day(self) -> str | None:
        """The day, if a template so far wrote it into a prompt."""
        return self.day if self._is_dated else None

    def of(
        self, path: str, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[PreTrainedTokenizerBase, TemplateSettings]:
        """The policy's tokenizer with its chat template, and the template's settings."""
        source = path if read_run_file(path) or self._first is None else self._first
        given = {name: getattr(self._options, name) for name in TEMPLATE_FLAGS}
        tokenizer, template = template_of(
            SimpleNamespace(**given), tokenizer, source, day=self.day, report=self._report_once
        )
        if depends_on_day(tokenizer, template):
            self._is_dated = True
            replace_text(self._path, json.dumps({"template_date": self.day}) + "\n")
        return tokenizer, template

    def _report_once(self, line: str) -> None:
        if line not in self._reported:
            self._reported.add(line)
            self._report(line)
