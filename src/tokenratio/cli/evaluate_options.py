"""What an evaluation is told, and the policies it is of."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenratio.cli.judges import JUDGES, judge_settings
from tokenratio.errors import TokenRatioError
from tokenratio.models.template_options import TemplateOptions
from tokenratio.run_folder import RUN_FILE
from tokenratio.settings import check_known, option

REFERENCE = "reference"
# Of a policy: also its folder's.
_NAME = re.compile(r"(?!\.)[\w.+=-]{1,100}")


@dataclass(frozen=True)
class EvaluateOptions(TemplateOptions):
    """What `evaluate` can be told."""

    output_dir: str = option("evaluation", "Folder for all files.")
    runs: list[str] | None = option(None, "In a recipe: the runs, as on the command line.")
    reference: str | None = option(
        None,
        "The policy that KL and implicit rewards are relative to; it is evaluated too. "
        "Default: what the first run started from.",
    )
    prompts: str | None = option(None, "Prompts to answer: a file, folder, hub name or world.")
    split: str | None = option("test", "Split of a folder or hub name.")
    columns: dict[str, Any] | None = option(
        None, "Our names to the data's columns: '{prompt: ask, chosen: good}'."
    )
    num_prompts: int | None = option(None, "Use only the first N prompts.")
    num_samples: int = option(5, "Responses per prompt.")
    temperature: float = option(1.0, "Sampling temperature; 0 is greedy.")
    top_p: float = option(1.0, "Probability mass to sample from.")
    max_new_tokens: int = option(128, "Most tokens in a response, EOS included.")
    seed: int = option(0, "Seed of the samples.")
    batch_size: int = option(16, "Rows run at once.")
    pairs: str | None = option(None, "Held-out pairs, for the implicit reward's accuracy.")
    subset_column: str | None = option(None, "Column of the pairs that names their subset.")
    max_length: int | None = option(2048, "Longest row of a pair, in tokens.")
    max_prompt_length: int | None = option(
        None, "Longest prompt, in tokens, cut on the left; set it as in training."
    )
    beta: float | None = option(
        None, "Scale of the implicit reward; default: each run's own, or 0.1."
    )
    against: str = option(
        REFERENCE,
        "Whom judges compare with: reference, another run's name, a file of "
        "generations, or column:NAME of the prompts' source, such as column:chosen.",
    )
    suite: str | None = option(
        None, "General ability: open-llm-v1, or a local task file of lm-eval."
    )
    judges: dict[str, Any] | None = option(
        None,
        f"By name ({', '.join(JUDGES)}), each with its settings; default: gold on a "
        "world's prompts. See docs/evaluation.md.",
    )

    def __post_init__(self) -> None:
        from tokenratio.data.worlds import is_world_source

        if not (self.prompts or self.pairs or self.suite):
            raise TokenRatioError("evaluate needs --prompts, --pairs or --suite")
        for name in ("num_samples", "max_new_tokens", "batch_size", "max_prompt_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TokenRatioError(f"{name} must be at least 1, not {value}")
        if not 0 <= self.temperature < math.inf:
            raise TokenRatioError(f"temperature must be 0 or positive, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise TokenRatioError(f"top_p must lie above 0 and at most at 1, not {self.top_p}")
        folder = Path(self.output_dir)
        first = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not first.is_dir():
            raise TokenRatioError(f"output_dir {folder}: {first} is a file")
        if self.num_prompts is not None and self.num_prompts < 1:
            raise TokenRatioError(f"num_prompts must be at least 1, not {self.num_prompts}")
        if self.beta is not None and not self.beta > 0:
            raise TokenRatioError(f"beta must be positive, not {self.beta}")
        for name, settings in (self.judges or {}).items():
            judge_settings(name, settings or {})
        if self.judges and self.prompts is None:
            raise TokenRatioError("judges compare responses: give --prompts")
        is_judged = self.judges or (self.judges is None and is_world_source(self.prompts or ""))
        if self.against != REFERENCE and not is_judged:
            raise TokenRatioError(f"nobody compares with {self.against}: give --judges")

    def check_runs(self, names: Sequence[str]) -> None:
        """Refuse, before anything is computed, what these policies leave without a counterpart.

        Args:
            names: of all policies, the reference's if there is one.
        Raises:
            TokenRatioError: what is missing.
        """
        has_reference = REFERENCE in names
        missing = "no run says what it started from: give --reference"
        if self.pairs is not None and not has_reference:
            raise TokenRatioError(f"pairs need a reference, and {missing}")
        if self.against == REFERENCE:
            if self.judges and not has_reference:
                raise TokenRatioError(
                    f"judges compare with the reference, and {missing}, or another --against"
                )
        elif not self.against.startswith("column:") and not self.against.endswith(".jsonl"):
            check_known([self.against], names, "run in --against", listed="")


@dataclass(frozen=True)
class Subject:
    """One policy to be evaluated.

    Attributes:
        name: what tables call it, and its folder.
        path: a model's folder or hub name, or a file of generations.
        record: the run's `run.json`; empty for another model.
    """

    name: str
    path: str
    record: Mapping[str, Any]

    @property
    def is_file(self) -> bool:
        """Whether only its generations are known."""
        return self.path.endswith(".jsonl")

    @property
    def config(self) -> Mapping[str, Any]:
        config = self.record.get("config")
        return config if isinstance(config, Mapping) else {}

    @property
    def start(self) -> str | None:
        """What the run says it is measured from: its `ref_model`, or the model it started from."""
        from tokenratio.models.provenance import relocated

        reference = self.record.get("reference")
        reference = reference if isinstance(reference, Mapping) else {}
        name, said = self.record.get("model"), reference.get("description")
        if isinstance(said, str) and said.startswith("ref_model "):
            name = said.removeprefix("ref_model ")
        if isinstance(reference.get("path"), str):
            name = reference["path"]
        if not isinstance(name, str) or not name:
            return None
        # Runs and what they started from may have been moved together; older runs name it relative
        # to where they were started, which is mostly a folder above them.
        folder = Path(self.path).resolve()
        moved = relocated(name, folder) if Path(name).is_absolute() else None
        places = [Path(name), *([] if moved is None else [moved])]
        places += [place / name for place in folder.parents]
        return next((str(place) for place in places if place.is_dir()), name)

    @property
    def loss(self) -> str | None:
        """What it was trained with, if a run of ours says so."""
        from tokenratio.losses import METHODS

        loss = self.config.get("loss")
        return loss if loss in METHODS else None


def subjects_of(runs: Sequence[str]) -> list[Subject]:
    """The policies that runs name, as `FOLDER`, `NAME=FOLDER` or a file of generations.

    Raises:
        TokenRatioError: a name that cannot be one, or two that are alike.
    """
    subjects = []
    for given in runs:
        name, named, path = str(given).partition("=")
        if not named or Path(str(given)).exists():
            named, path = "", str(given)
        # The two last parts, without the root: runs/a and /runs/a are both runs-a.
        parts = [part for part in Path(path.removesuffix(".jsonl")).parts if part != "/"]
        name = name if named else "-".join(parts[-2:])
        if not path or not _NAME.fullmatch(name) or name == REFERENCE:
            raise TokenRatioError(
                f"{given!r}: {name!r} cannot be a policy's name (letters, digits, . _ + = -, at "
                "most 100); give one, as in NAME=FOLDER"
            )
        subjects.append(Subject(name, path, _record(path)))
    names = [subject.name for subject in subjects]
    for name in names:
        if names.count(name) > 1:
            raise TokenRatioError(
                f"two runs are called {name}: give names, as in a=FOLDER b=FOLDER"
            )
    return subjects


def _record(path: str) -> Mapping[str, Any]:
    try:
        record = json.loads((Path(path) / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
