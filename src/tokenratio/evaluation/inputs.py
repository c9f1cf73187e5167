"""What an evaluation runs on: policies with their models and chat templates, and prompts."""

import gc
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypedDict, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenratio.data import read_rows, source_digest
from tokenratio.data.chat import Prompt, prompt_value
from tokenratio.data.prompts import read_prompts
from tokenratio.data.sources import DataSource, Source, is_hub_name
from tokenratio.data.template import TemplateSettings, depends_on_day
from tokenratio.data.worlds import World, is_world_source, world_of
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.judges.protocol import digest_of
from tokenratio.evaluation.options import REFERENCE, EvaluateOptions
from tokenratio.evaluation.response_files import AnsweredPrompt, dataset_responses, read_responses
from tokenratio.losses import METHODS
from tokenratio.models.device import default_device, sampling_dtype
from tokenratio.models.gguf import is_gguf
from tokenratio.models.loading import load_model
from tokenratio.models.packages import PREFIX
from tokenratio.models.processes import current
from tokenratio.models.provenance import absolute, relocated
from tokenratio.models.template_options import TEMPLATE_FLAGS, template_of
from tokenratio.names import split_name
from tokenratio.records import as_shape
from tokenratio.run_folder import (
    RUN_FILE,
    RunRecord,
    read_document,
    read_run_file,
    replace_text,
    run_document,
)

# A policy's name is also the name of its folder.
_NAME = re.compile(r"(?!\.)[\w.+=-]{1,100}")


@dataclass(frozen=True)
class Subject:
    """A policy to evaluate.

    Attributes:
        name: its name in tables, and that of its folder.
        path: a run's folder, another model's folder or hub name, or a file of generations.
        record: the run's `run.json`; empty for any other model.
    """

    name: str
    path: str
    record: Mapping[str, Any]

    @property
    def is_file(self) -> bool:
        """Whether it is a file of generations, without a model."""
        return self.path.endswith(".jsonl")

    @property
    def config(self) -> Mapping[str, Any]:
        """The settings that the run was trained with."""
        return self.record.get("config") or {}

    @property
    def start(self) -> str | None:
        """The reference that the run recorded: its `ref_model`, or the model it started from."""
        reference = self.record.get("reference") or {}
        # Runs of 0.1.0 call the name `path`.
        name = reference.get("name", reference.get("path", self.record.get("model")))
        if not isinstance(name, str) or not name:
            return None
        found = self._place_of(name, lambda at: at.is_dir() or (is_gguf(at) and at.is_file()))
        return found or name

    @property
    def data(self) -> tuple[list[DataSource], list[str]]:
        """The sources of its held-out pairs, or else of its training pairs, and those left out.

        Those that cannot be read again, such as a list of rows, are left out, by name.
        """
        recorded = self.record.get("data") or {}
        held_out = {role: recorded[role] for role in recorded if role != "train"}
        lost = []
        for roles in (held_out, {"train": recorded.get("train")}):
            found: dict[str, DataSource] = {}
            for account in roles.values():
                for source in (account or {}).get("sources", []):
                    name, is_world = source["name"], is_world_source(source["name"])
                    if not is_world:
                        is_hub = is_hub_name(name)
                        name = self._place_of(name, Path.exists) or (name if is_hub else "")
                    if name:
                        split = None if is_world else source.get("split")
                        found[f"{name}@{split}"] = DataSource(name, split=split)
                    else:
                        lost.append(source["name"])
            if found:
                return [*found.values()], lost
        return [], lost

    def _place_of(self, name: str, is_it: Callable[[Path], bool]) -> str | None:
        """Where a file or folder that the run used is now.

        Runs may have been moved together with what they used. Older runs name it relative to the
        working directory they were started in, which is usually a folder above the run.
        """
        folder = Path(self.path).resolve()
        moved = relocated(name, folder) if Path(name).is_absolute() else None
        places = [Path(name), *([] if moved is None else [moved])]
        places += [place / name for place in folder.parents]
        return next((str(place) for place in places if is_it(place)), None)

    @property
    def group(self) -> str:
        """The method it was trained with, if it is one of ours, else its name."""
        loss = self.config.get("loss")
        return loss if loss in METHODS else self.name


def subjects_of(runs: Sequence[str | Path]) -> list[Subject]:
    """The policies given as `MODEL` or `NAME=MODEL`: a model's name or a file of generations."""
    subjects: dict[str, Subject] = {}
    for given in map(str, runs):
        chosen, path = split_name(given)
        # The last two parts, without the root: runs/a and /runs/a are both runs-a.
        short = path.removesuffix(".jsonl").removeprefix(PREFIX)
        parts = [part for part in Path(short).parts if part != "/"]
        name = "-".join(parts[-2:]) if chosen is None else chosen
        if not path or not _NAME.fullmatch(name) or name == REFERENCE:
            raise TokenRatioError(
                f"{given!r}: {name!r} cannot be a policy's name (letters, digits, . _ + = -, at "
                "most 100); choose one, as in NAME=FOLDER"
            )
        if name in subjects and subjects[name].path == path:
            raise TokenRatioError(f"{path} is given twice: leave one out")
        if name in subjects:
            raise TokenRatioError(
                f"two runs are called {name}: give them different names, as in a=FOLDER b=FOLDER"
            )
        record = as_shape(RunRecord, run_document(path) or {}, str(Path(path) / RUN_FILE))
        subjects[name] = Subject(name, path, cast(Mapping[str, Any], record))
    return list(subjects.values())


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy that is ready to run.

    Attributes:
        ref_model: None for the reference itself, and if there is no reference.
        template: settings of its chat template.
        batch_size: rows in one forward pass.
    """

    model: PreTrainedModel
    ref_model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    template: TemplateSettings
    batch_size: int


class ModelPool:
    """Loads models by name onto the default device, and shares them.

    Args:
        kept: models to hold throughout. Of all others, only the last one asked for is held.
        dtype: of the weights; `auto` is float32 for models that score, since the rounding of
            bfloat16 is larger than a small KL, and `fastest_dtype` for those that sample.

    Attributes:
        dtype, sampling_dtype: of the models that score and of those that sample, by name.
    """

    def __init__(self, kept: Iterable[str] = (), *, dtype: str = "auto") -> None:
        self.dtype = "float32" if dtype == "auto" else dtype
        self.sampling_dtype = sampling_dtype(dtype)
        self._kept = set(map(_model_key, kept))
        self._models: dict[str, PreTrainedModel] = {}

    def sampling_model(self, path: str) -> PreTrainedModel:
        """The model to sample from; it is held only if it has the precision to score too."""
        if self.sampling_dtype == self.dtype:
            return self.model(path)
        self._drop_but(path)
        return _load(path, self.sampling_dtype)

    def model(self, path: str) -> PreTrainedModel:
        """The model to score with."""
        key = _model_key(path)
        if key not in self._models:
            self._drop_but(path)
            self._models[key] = _load(path, self.dtype)
        return self._models[key]

    def _drop_but(self, path: str) -> None:
        """Free the memory of all models that are not kept, except one."""
        others = self._models.keys() - self._kept - {_model_key(path)}
        for other in others:
            del self._models[other]
        if others:
            gc.collect()  # a model that has scored refers to itself (`answer_token_requests`)


class _Template(TypedDict, total=False):
    template_date: str


class PolicyTemplates:
    """Each policy's chat template as it was trained, all on one day, recorded in `template.json`.

    Attributes:
        day: that of the options, else of the folder, else of the first run with one, else today.
        written_day: the day, if a template so far wrote it into a prompt.
    """

    def __init__(
        self,
        subjects: Sequence[Subject],
        options: EvaluateOptions,
        report: Callable[[str], None],
    ) -> None:
        self._options, self._report = options, report
        self._path = Path(options.output_dir) / "template.json"
        self._reported: set[str] = set()
        self.written_day: str | None = None
        recorded = [subject for subject in subjects if subject.config]
        # A policy without a record, such as the reference, is rendered as the first run is.
        self._first = recorded[0].path if recorded else None
        days = [
            options.template_date,
            as_shape(_Template, read_document(self._path) or {}, str(self._path)).get(
                "template_date"
            ),
            *(subject.config.get("template_date") for subject in recorded),
        ]
        day = next(filter(None, days), TemplateSettings().day.isoformat())
        self.day: str = current().on_first(lambda: day)

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
            self.written_day = self.day
            if not current().index:
                replace_text(self._path, json.dumps({"template_date": self.day}) + "\n")
        return tokenizer, template

    def _report_once(self, line: str) -> None:
        if line not in self._reported:
            self._reported.add(line)
            self._report(line)


class PromptSet:
    """The prompts that the options name, and the responses to them that are read, not sampled.

    Attributes:
        prompts: `(id, prompt)`, each prompt once; empty if the options name none.
        world: the synthetic world that they come from, if any.
    """

    def __init__(self, options: EvaluateOptions, report: Callable[[str], None]) -> None:
        self._options = options
        self.prompts: list[tuple[str, Prompt]] = []
        self.world: World | None = None
        source = options.prompts
        if source is None:
            return
        rows = read_prompts(source, split=options.split, columns=options.columns)
        # Rows with the same prompt are not independent draws.
        first: dict[str, tuple[str, Prompt]] = {}
        for id, prompt in rows:
            first.setdefault(digest_of(prompt_value(prompt)), (id, prompt))
        if len(first) < len(rows):
            report(f"{len(rows)} rows have {len(first)} different prompts: each is asked once")
        self.prompts = list(first.values())[: options.num_prompts]
        if is_world_source(source):
            self.world = world_of(source)
            self.world.require()

    def responses(self, path: str) -> list[AnsweredPrompt]:
        """A file's responses to these prompts, in their order; refuses ids with another prompt."""
        if not self.prompts:
            return []
        found = {generation.id: generation for generation in read_responses(path)}
        missing = [id for id, _ in self.prompts if id not in found]
        if missing:
            raise TokenRatioError(
                f"{path} has no answer to {len(missing)} of {len(self.prompts)} prompts, first "
                f"{missing[0]}"
            )
        for id, prompt in self.prompts:
            if found[id].prompt != prompt:
                raise TokenRatioError(
                    f"{path}: the prompt of {id} differs from the one in this evaluation"
                )
        return [found[id] for id, _ in self.prompts]

    def opponents(self) -> list[AnsweredPrompt] | None:
        """What judges compare with, if it is a column or a file; None if it is a policy."""
        options, against = self._options, self._options.against
        if not self.prompts:
            return None
        if against.startswith("column:"):
            given = dataset_responses(
                str(options.prompts),
                column=against.removeprefix("column:"),
                split=options.split,
                columns=options.columns,
            )
            asked = {id for id, _ in self.prompts}
            return [generation for generation in given if generation.id in asked]
        return self.responses(against) if against.endswith(".jsonl") else None

    def digests(self, pairs: "Source | None") -> dict[str, str]:
        """A digest of each prompt and held-out pair, by `prompt ID` or `pair ID`."""
        found = {
            f"prompt {id}": digest_of(prompt_value(prompt))[:16] for id, prompt in self.prompts
        }
        if pairs is not None:
            rows = read_rows(pairs, split=self._options.split)
            found |= {f"pair {row.origin}": source_digest([row])[:16] for row in rows}
        return found


def _load(path: str, dtype: str) -> PreTrainedModel:
    model = load_model(path, {"dtype": dtype})
    model.to(default_device())  # type: ignore[arg-type]  # a wrapped method
    return model


def _model_key(path: str) -> str:
    """The same for every way to write a folder's path."""
    path = absolute(path)
    return os.path.realpath(path) if os.path.exists(path) else path
