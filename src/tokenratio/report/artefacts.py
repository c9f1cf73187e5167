"""What a report is made from: files of runs and evaluations, read as far as they are there."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict, cast

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.options import REFERENCE
from tokenratio.evaluation.results import MEASURES_FILE, PolicyMeasures
from tokenratio.evaluation.stability import MetricsLog, read_metrics
from tokenratio.names import split_name
from tokenratio.records import as_shape
from tokenratio.run_folder import EVAL_FILE, METRICS_FILE, RUN_FILE, read_run_file, run_document

GENERATIONS_FILE = "generations.jsonl"
# Where an evaluation of a run is looked for: beside it, in it, and where `evaluate` writes.
_EVALUATION = "evaluation"


class _Rows(TypedDict, total=False):
    rows: int
    examples: list[dict[str, Any]]


class _Account(TypedDict, total=False):
    digest: str
    sources: list[dict[str, Any]]
    rows_kept: int
    unit: str
    lengths: dict[str, int]
    shortest: dict[str, int]
    longest: dict[str, int]
    truncated: dict[str, _Rows]
    refused: dict[str, _Rows]
    odd: dict[str, _Rows]


class _Config(TypedDict, total=False):
    loss: str
    learning_rate: float | None
    beta: float | None
    sft_weight: float | None
    max_grad_norm: float | None
    logging_steps: float | None


class _Record(TypedDict, total=False):
    """Of `run.json` what a report computes with; the rest is shown as it is."""

    config: _Config
    versions: dict[str, Any]
    data: dict[str, _Account | None]
    resumptions: list[dict[str, Any]]


@dataclass(frozen=True)
class RunFiles:
    """A run, from its folder.

    Attributes:
        name: how the report calls it.
        record: `run.json`; empty if it is missing.
        log: `metrics.jsonl`; None without a training step.
        held_out: `eval.json`; None if the run has not been evaluated at its end.
        missing: what is not there, in words.
    """

    name: str
    folder: Path
    record: Mapping[str, Any]
    log: MetricsLog | None
    held_out: Mapping[str, Any] | None
    missing: tuple[str, ...] = ()

    @property
    def config(self) -> Mapping[str, Any]:
        """The settings; empty if they are not known."""
        return self.record.get("config") or {}

    @property
    def data(self) -> Mapping[str, Mapping[str, Any]]:
        """The report on the rows of each role, `train` and `eval`, as far as they are known."""
        parts: Mapping[str, Any] = self.record.get("data") or {}
        return {role: account for role, account in parts.items() if account is not None}

    @property
    def method(self) -> str:
        """The loss, or `reward model`."""
        return str(self.record.get("kind") or self.config.get("loss") or "unknown method")

    @property
    def step(self) -> int:
        """The last logged step; 0 without one."""
        return 0 if self.log is None else int(self.log.lines[-1]["step"])

    @property
    def progress(self) -> float | None:
        """The share of the run that is logged, at most 1; None if its length is not known."""
        if self.log is None:
            return None
        if self.held_out is not None:  # evaluated at its end, which may have come early
            return 1.0
        steps, epochs = self.config.get("max_steps") or 0, self.config.get("num_train_epochs") or 0
        if steps > 0:
            every = self.config.get("logging_steps") or 1
            # No further line is logged within the last steps.
            return 1.0 if self.step + every > steps else self.step / steps
        epoch = self.log.lines[-1].get("epoch")
        return min(1.0, epoch / epochs) if epoch is not None and epochs > 0 else None


@dataclass(frozen=True)
class EvaluatedPolicy:
    """A policy's measures and the folder that holds them, its responses beside."""

    measures: PolicyMeasures
    folder: Path

    @property
    def name(self) -> str:
        return self.measures.policy

    @property
    def responses_file(self) -> Path:
        return self.folder / GENERATIONS_FILE


@dataclass(frozen=True)
class Artefacts:
    """Runs and evaluated policies: the reference first, then in the runs' order. Names differ."""

    runs: tuple[RunFiles, ...]
    policies: tuple[EvaluatedPolicy, ...]
    missing: tuple[str, ...] = field(default=())

    @property
    def reference(self) -> EvaluatedPolicy | None:
        """The policy that the others are compared with."""
        return next((each for each in self.policies if each.name == REFERENCE), None)

    @property
    def aligned(self) -> list[EvaluatedPolicy]:
        """The policies other than the reference."""
        return [each for each in self.policies if each.name != REFERENCE]


def read_artefacts(given: Sequence[str | Path]) -> Artefacts:
    """What the folders hold.

    Args:
        given: folders of runs, of evaluations or of a policy in one, each may be `NAME=` a run's.
            Without an evaluation among them, those of the runs are looked for.
    Raises:
        TokenRatioError: a folder is neither, or a file in one is damaged.
    """
    folders = [split_name(str(each)) for each in given]
    for name, path in folders:
        if name is not None and _is_evaluation(Path(path)):
            raise TokenRatioError(
                f"{path} is an evaluation, whose policies have names: leave out {name}="
            )
    evaluations = [Path(path) for _, path in folders if _is_evaluation(Path(path))]
    named = [(name, Path(path)) for name, path in folders if not _is_evaluation(Path(path))]
    for _, folder in named:
        _require_run(folder)
    if len({folder.resolve() for _, folder in named}) < len(named):
        raise TokenRatioError("a run is given twice: give each folder once")
    names = _unique_names(named)
    runs = tuple(_read_run(name, folder) for name, (_, folder) in zip(names, named, strict=True))
    missing: tuple[str, ...] = ()
    if evaluations:
        policies = [policy for folder in evaluations for policy in _read_evaluation(folder)]
    else:
        policies, missing = _found_evaluations(runs)

    def place(policy: EvaluatedPolicy) -> tuple[bool, int]:
        own = (i for i, run in enumerate(runs) if is_of_run(policy.measures, run))
        return policy.name != REFERENCE, next(own, len(runs))

    return Artefacts(runs, tuple(sorted(_distinct(policies), key=place)), missing)


def is_of_run(policy: PolicyMeasures, run: RunFiles) -> bool:
    """Whether the policy is the one that the run's folder holds.

    A relative path was recorded from another working directory perhaps: its parts decide.
    """
    path = Path(str(policy.settings.get("path") or ""))
    parts, folder = path.parts, run.folder.resolve()
    if not parts:
        return False
    return path.resolve() == folder or (
        not path.is_absolute() and ".." not in parts and folder.parts[-len(parts) :] == parts
    )


def _is_evaluation(folder: Path) -> bool:
    return (folder / MEASURES_FILE).is_file() or any(folder.glob(f"*/{MEASURES_FILE}"))


def _is_run(folder: Path) -> bool:
    return (folder / METRICS_FILE).is_file() or run_document(folder) is not None


def _require_run(folder: Path) -> None:
    """Refuse what is no run; names those that the folder holds."""
    if _is_run(folder):
        return
    if not folder.is_dir():
        what = "is a file: give the run's folder" if folder.exists() else "does not exist"
        raise TokenRatioError(f"{folder} {what}")
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    found = [str(path) for path in inside if _is_run(path) or _is_evaluation(path)]
    hint = f"; give what it holds: {' '.join(found)}" if found else ""
    raise TokenRatioError(
        f"{folder} is neither a run (it has no {RUN_FILE} or {METRICS_FILE} of tokenratio) nor an "
        f"evaluation{hint}"
    )


def _read_run(name: str, folder: Path) -> RunFiles:
    from tokenratio.training.model_card import held_out_figures

    record, missing = read_run_file(folder), []
    if record is None:
        missing.append(f"{RUN_FILE} is missing or not readable: its settings are not shown")
    log = None
    if not (folder / METRICS_FILE).is_file():
        missing.append(f"{METRICS_FILE} is missing: there are no curves")
    elif b'"loss"' not in (folder / METRICS_FILE).read_bytes().rpartition(b"\n")[0]:
        missing.append(f"{METRICS_FILE} holds no training step yet")
    else:
        log = read_metrics(folder)
        missing += _left_out(log)
    held_out = held_out_figures(folder)
    if held_out is None and (folder / EVAL_FILE).exists():
        missing.append(f"{EVAL_FILE} is damaged or older than the run: it is left out")
    shaped = as_shape(_Record, record or {}, str(folder / RUN_FILE))
    return RunFiles(name, folder, cast(Any, shaped), log, held_out, tuple(missing))


def _left_out(log: MetricsLog) -> Iterator[str]:
    """What the curves of a log do not show."""
    if log.num_truncated:
        yield f"the last line of {METRICS_FILE} is cut off and left out"
    if number := log.num_duplicates:
        yield f"{METRICS_FILE} logs {counted(number, 'step')} again later: the last line counts"
    numbers = Counter(
        name
        for line in (*log.lines, *log.evaluations)
        for name, value in line.items()
        if isinstance(value, float) and not math.isfinite(value)
    )
    for name, number in numbers.items():
        yield f"{name}: {counted(number, 'value')} not finite, left out"


def counted(number: int, what: str) -> str:
    """A number of things in words.

    >>> counted(1, "row"), counted(1200, "row")
    ('1 row', '1,200 rows')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _unique_names(named: Sequence[tuple[str | None, Path]]) -> list[str]:
    """A name for each run: its own, or the end of its path that no other has."""
    parts = [path.resolve().parts for _, path in named]
    names = []
    for (name, _), own in zip(named, parts, strict=True):
        others = [each for each in parts if each != own]
        size = next(
            (n for n in range(1, len(own)) if all(o[-n:] != own[-n:] for o in others)), len(own)
        )
        names.append(name or "/".join(own[-size:]))
    for name in names:
        if names.count(name) > 1:
            raise TokenRatioError(f"two runs are called {name}: give them different names")
    return names


def _read_evaluation(folder: Path) -> list[EvaluatedPolicy]:
    """The policies of an evaluation; of a policy's own folder, it and the reference."""
    if (folder / MEASURES_FILE).is_file():
        beside = folder.resolve().parent / REFERENCE
        places = [beside, folder] if (beside / MEASURES_FILE).is_file() else [folder]
        if folder.resolve() == beside:
            places = [folder]
    else:
        places = sorted(path.parent for path in folder.glob(f"*/{MEASURES_FILE}"))
    found = [EvaluatedPolicy(PolicyMeasures.load(place), place) for place in places]
    return sorted(found, key=lambda policy: policy.name != REFERENCE)


def _found_evaluations(
    runs: Iterable[RunFiles],
) -> tuple[list[EvaluatedPolicy], tuple[str, ...]]:
    """The policies of these runs, and their reference, where an evaluation of them is found."""
    runs, missing = list(runs), []
    places = [place for run in runs for place in (run.folder, run.folder.resolve().parent)]
    found: list[EvaluatedPolicy] = []
    for folder in {(p / _EVALUATION).resolve(): None for p in [*places, Path.cwd()]}:
        if not _is_evaluation(folder):
            continue
        try:
            policies = _read_evaluation(folder)
        except TokenRatioError as error:
            missing.append(f"an evaluation is left out: {error}")
            continue
        ours = [p for p in policies if any(is_of_run(p.measures, run) for run in runs)]
        if ours:
            found += [p for p in policies if p in ours or p.name == REFERENCE]
    return found, tuple(missing)


def _distinct(policies: Sequence[EvaluatedPolicy]) -> list[EvaluatedPolicy]:
    """Each policy once, under a name of its own; of several references the first."""
    kept: dict[str, EvaluatedPolicy] = {}
    for policy in sorted(policies, key=lambda policy: policy.name != REFERENCE):
        name = policy.name
        if name == REFERENCE and name in kept:
            continue
        if name in kept:
            if kept[name].folder.resolve() == policy.folder.resolve():
                continue
            name = f"{name} ({policy.folder.resolve().parent.name})"
        kept[name] = replace(policy, measures=replace(policy.measures, policy=name))
    return list(kept.values())
