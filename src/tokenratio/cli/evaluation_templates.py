"""What the policies of one evaluation are rendered with: as they were trained, all on one day."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

from transformers import PreTrainedTokenizerBase

from tokenratio.cli.evaluate_options import EvaluateOptions, Subject
from tokenratio.data.template import TemplateSettings, depends_on_day
from tokenratio.models.template_options import TEMPLATE_FLAGS, template_of
from tokenratio.run_folder import read_document, replace_text

_FILE = "template.json"


class EvaluationTemplates:
    """Finds out for each policy, and keeps the day in the evaluation's folder.

    Attributes:
        day: that of the options, of the folder, of the first run that has one, or today.
        is_dated: whether a policy's template wrote it so far.
    """

    def __init__(
        self,
        subjects: Sequence[Subject],
        options: EvaluateOptions,
        folder: Path,
        report: Callable[[str], None],
    ) -> None:
        self._options, self._path, self._report = options, folder / _FILE, report
        self._said: set[str] = set()
        self.is_dated = False
        recorded = [subject for subject in subjects if subject.config]
        # A policy without a record, such as the reference, is asked as the first run is.
        self._first = recorded[0] if recorded else None
        days = [
            options.template_date,
            (read_document(self._path) or {}).get("template_date"),
            *(subject.config.get("template_date") for subject in recorded),
        ]
        self.day: str = next(filter(None, days), TemplateSettings().day.isoformat())

    def of(
        self, path: str, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[PreTrainedTokenizerBase, TemplateSettings]:
        """The policy's tokenizer with its chat template, and what that is told."""
        own = Subject(path, path, read_document(Path(path) / "run.json") or {})
        source = own if own.config or self._first is None else self._first
        given = {name: getattr(self._options, name) for name in TEMPLATE_FLAGS}
        tokenizer, template = template_of(
            SimpleNamespace(**given), tokenizer, source.path, day=self.day, report=self._say
        )
        if depends_on_day(tokenizer, template):
            self.is_dated = True
            replace_text(self._path, json.dumps({"template_date": self.day}) + "\n")
        return tokenizer, template

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._report(line)
