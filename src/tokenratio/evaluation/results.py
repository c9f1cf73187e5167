"""The measures of a policy: named figures with standard errors and the values behind them."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.estimates import clustered_mean
from tokenratio.markdown import markdown_table
from tokenratio.masking import mask_secrets
from tokenratio.records import read_record
from tokenratio.run_folder import replace_text, versions

MEASURES_FILE = "measures.json"
_FORMAT = 1

# A prompt's id, which of its samples (or pairs), and the value there.
Value = tuple[str, int, float]
Better = Literal["higher", "lower"] | None


@dataclass(frozen=True)
class Measure:
    """One figure.

    Attributes:
        name: `group/what`, such as `win_rate/gold`.
        mean: over all values.
        standard_error: prompts taken as the independent draws; nan where there is none.
        num: values.
        unit: of mean and values; a "share" is shown in percent.
        better: which direction is better; None if neither is.
        values: those averaged, by prompt; empty if the figure is not a mean of values.
    """

    name: str
    mean: float
    standard_error: float
    num: int
    unit: str = ""
    better: Better = None
    values: tuple[Value, ...] = field(default=(), repr=False)

    @property
    def text(self) -> str:
        """`mean ± standard error`, as it is shown."""
        if math.isnan(self.mean):
            return "–"
        scale, digits, sign = (100, 1, "%") if self.unit == "share" else (1, 3, "")
        error = ""
        if not math.isnan(self.standard_error):
            error = f" ± {self.standard_error * scale:.{digits}f}"
        return f"{self.mean * scale:.{digits}f}{error}{sign}"


def measure_of(
    name: str, values: Iterable[Value], *, unit: str = "", better: Better = None
) -> Measure:
    """The mean of values that are grouped by prompt, without those that are nan."""
    kept = [value for value in values if not math.isnan(value[2])]
    estimate = clustered_mean([value for *_, value in kept], [prompt for prompt, *_ in kept])
    return Measure(
        name, estimate.mean, estimate.standard_error, estimate.num, unit, better, tuple(kept)
    )


@dataclass(frozen=True)
class PolicyMeasures:
    """All measures of one policy.

    Attributes:
        policy: its name.
        group: such as the loss it was trained with; a frontier is drawn for each group.
        settings: how it was measured.
        notes: what a reader must know.
        contents: a digest of every prompt and pair by `prompt ID` and `pair ID`, because the same
            ids in two evaluations may name different texts.
    """

    policy: str
    group: str
    settings: Mapping[str, Any]
    measures: tuple[Measure, ...]
    notes: tuple[str, ...] = ()
    contents: Mapping[str, str] = field(default_factory=dict)

    def named(self, name: str) -> Measure | None:
        """The measure of that name, if there is one."""
        return next((measure for measure in self.measures if measure.name == name), None)

    def values(self, name: str) -> tuple[Value, ...]:
        """The values of the measure of that name; empty without it."""
        found = self.named(name)
        return () if found is None else found.values

    def save(self, folder: Path) -> None:
        """Write `measures.json`."""
        document = {"format": _FORMAT, "versions": versions(), **asdict(self)}
        document["settings"] = mask_secrets(document["settings"])
        text = json.dumps(without_nan(document), indent=1, ensure_ascii=False)
        replace_text(folder / MEASURES_FILE, text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "PolicyMeasures":
        """Read `measures.json`, given as the file or its folder.

        Raises:
            TokenRatioError: it is missing or not a file of measures.
        """
        path = Path(path)
        path = path / MEASURES_FILE if path.is_dir() else path
        if not path.is_file():
            raise TokenRatioError(
                f"{path} cannot be read (No such file): give a folder that `tokenratio evaluate` "
                "wrote"
            )
        document = read_record(_Document, path, "this is not a file of measures")
        return cls(
            document["policy"],
            document["group"],
            document["settings"],
            tuple(map(_measure, document["measures"])),
            tuple(document["notes"]),
            document["contents"],
        )


class _Entry(TypedDict):
    """A measure in the file, with null for nan."""

    name: str
    mean: float | None
    standard_error: float | None
    num: int
    unit: str
    better: Better
    values: list[tuple[str, int, float | None]]


class _Document(TypedDict):
    format: Literal[1]
    policy: str
    group: str
    settings: dict[str, Any]
    measures: list[_Entry]
    notes: list[str]
    contents: dict[str, str]


def table(policies: Sequence[PolicyMeasures]) -> str:
    """A Markdown table: a row per measure, a column per policy."""
    names = list(dict.fromkeys(m.name for policy in policies for m in policy.measures))
    lines = []
    for name in names:
        found = [policy.named(name) for policy in policies]
        first = next(measure for measure in found if measure is not None)
        arrow = {"higher": " ↑", "lower": " ↓", None: ""}[first.better]
        unit = f" ({first.unit})" if first.unit not in ("", "share") else ""
        texts = [measure.text if measure is not None else "–" for measure in found]
        lines.append([f"{name}{unit}{arrow}", *texts])
    return markdown_table(["measure", *(policy.policy for policy in policies)], lines)


def _measure(entry: _Entry) -> Measure:
    return Measure(
        entry["name"],
        float_of(entry["mean"]),
        float_of(entry["standard_error"]),
        entry["num"],
        entry["unit"],
        entry["better"],
        tuple((prompt, sample, float_of(value)) for prompt, sample, value in entry["values"]),
    )


def without_nan(value: Any) -> Any:
    """The same value with null for nan and infinity, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return value


def float_of(value: float | None) -> float:
    """A figure read from JSON, where null stands for nan."""
    return math.nan if value is None else float(value)
