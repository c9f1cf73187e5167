"""The policies that an evaluation is about: names, folders, and what their runs recorded."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenratio.errors import TokenRatioError
from tokenratio.run_folder import RUN_FILE, read_document

REFERENCE = "reference"
# A policy's name is also the name of its folder.
_NAME = re.compile(r"(?!\.)[\w.+=-]{1,100}")


@dataclass(frozen=True)
class Subject:
    """A policy to evaluate.

    Attributes:
        name: what tables and folders call it.
        path: a run's folder, another model's folder or hub name, or a file of generations.
        record: the run's `run.json`; empty for any other model.
    """

    name: str
    path: str
    record: Mapping[str, Any]

    @property
    def is_file(self) -> bool:
        """Whether there are only its generations, and no model."""
        return self.path.endswith(".jsonl")

    @property
    def config(self) -> Mapping[str, Any]:
        """The settings that the run was trained with."""
        config = self.record.get("config")
        return config if isinstance(config, Mapping) else {}

    @property
    def start(self) -> str | None:
        """The reference that the run recorded: its `ref_model`, or the model it started from."""
        from tokenratio.models.provenance import relocated

        reference = self.record.get("reference")
        reference = reference if isinstance(reference, Mapping) else {}
        # Runs of 0.1.0 call the name `path`.
        name = reference.get("name", reference.get("path", self.record.get("model")))
        if not isinstance(name, str) or not name:
            return None
        # Runs may have been moved together with their reference. Older runs name it relative to
        # the working directory they were started in, which is usually a folder above the run.
        folder = Path(self.path).resolve()
        moved = relocated(name, folder) if Path(name).is_absolute() else None
        places = [Path(name), *([] if moved is None else [moved])]
        places += [place / name for place in folder.parents]
        return next((str(place) for place in places if place.is_dir()), name)

    @property
    def loss(self) -> str | None:
        """The method it was trained with, if `run.json` names one of ours."""
        from tokenratio.losses import METHODS

        loss = self.config.get("loss")
        return loss if loss in METHODS else None


def subjects_of(runs: Sequence[str | Path]) -> list[Subject]:
    """The policies given as `FOLDER`, `NAME=FOLDER`, a hub name or a file of generations.

    Raises:
        TokenRatioError: a name that is not allowed, or the same name twice.
    """
    subjects = []
    for given in map(str, runs):
        name, named, path = given.partition("=")
        if not named or Path(given).exists():
            named, path = "", given
        # The last two parts, without the root: runs/a and /runs/a are both runs-a.
        parts = [part for part in Path(path.removesuffix(".jsonl")).parts if part != "/"]
        name = name if named else "-".join(parts[-2:])
        if not path or not _NAME.fullmatch(name) or name == REFERENCE:
            raise TokenRatioError(
                f"{given!r}: {name!r} cannot be a policy's name (letters, digits, . _ + = -, at "
                "most 100); choose one, as in NAME=FOLDER"
            )
        subjects.append(Subject(name, path, read_document(Path(path) / RUN_FILE) or {}))
    names = [subject.name for subject in subjects]
    for name in names:
        if names.count(name) > 1:
            raise TokenRatioError(
                f"two runs are called {name}: give them different names, as in a=FOLDER b=FOLDER"
            )
    return subjects
