"""The measures of a policy: named figures with standard errors and the values behind them."""

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.estimates import clustered_mean
from tokenratio.run_folder import replace_text, versions

MEASURES_FILE = "measures.json"
_FORMAT = 1

# A prompt's id, which of its samples (or pairs), and the value there.
Value = tuple[str, int, float]


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
        values: those that the mean is of, by prompt; empty if the figure is not such a mean.
    """

    name: str
    mean: float
    standard_error: float
    num: int
    unit: str = ""
    better: Literal["higher", "lower"] | None = None
    values: tuple[Value, ...] = field(default=(), repr=False)

    @property
    def text(self) -> str:
        """`mean ± standard error`, as it is shown."""
        scale = 100 if self.unit == "share" else 1
        mean, error = self.mean * scale, self.standard_error * scale
        sign = "%" if self.unit == "share" else ""
        if math.isnan(mean):
            return "–"
        digits = 1 if self.unit == "share" else 3
        if math.isnan(error):
            return f"{mean:.{digits}f}{sign}"
        return f"{mean:.{digits}f} ± {error:.{digits}f}{sign}"


def measure_of(
    name: str,
    values: Iterable[Value],
    *,
    unit: str = "",
    better: Literal["higher", "lower"] | None = None,
) -> Measure:
    """The mean of values that are grouped by prompt, without those that are nan."""
    kept = [value for value in values if not math.isnan(value[2])]
    if not kept:
        return Measure(name, math.nan, math.nan, 0, unit, better)
    groups: dict[str, list[float]] = {}
    for prompt, _, value in kept:
        groups.setdefault(prompt, []).append(value)
    ordered = [value for group in groups.values() for value in group]
    estimate = clustered_mean(ordered, [len(group) for group in groups.values()])
    return Measure(
        name, estimate.mean, estimate.standard_error, estimate.num, unit, better, tuple(kept)
    )


@dataclass(frozen=True)
class PolicyMeasures:
    """All measures of one policy.

    Attributes:
        policy: its name.
        group: policies that frontiers put together, such as the loss it was trained with.
        settings: how it was measured.
        notes: what a reader has to know.
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
        """The measure of that name."""
        return next((measure for measure in self.measures if measure.name == name), None)

    def save(self, folder: Path) -> None:
        """Write `measures.json`."""
        document = {"format": _FORMAT, "versions": versions(), **asdict(self)}
        text = json.dumps(_plain(document), indent=1, ensure_ascii=False)
        replace_text(folder / MEASURES_FILE, text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "PolicyMeasures":
        """Read `measures.json`, given as the file or its folder.

        Raises:
            TokenRatioError: it is missing or not such a file.
        """
        path = Path(path)
        path = path / MEASURES_FILE if path.is_dir() else path
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["format"] != _FORMAT:
                raise ValueError(f"format {document['format']}, not {_FORMAT}")
            measures = tuple(map(_measure, document["measures"]))
            return cls(
                document["policy"],
                document["group"],
                document["settings"],
                measures,
                tuple(document["notes"]),
                dict(document["contents"]),
            )
        except OSError as error:
            raise TokenRatioError(
                f"{path} cannot be read ({error.strerror}): give a folder that `tokenratio "
                "evaluate` wrote"
            ) from None
        except (ValueError, LookupError, TypeError) as error:
            raise TokenRatioError(f"{path} is not a file of measures: {error}") from None


def table(policies: Sequence[PolicyMeasures]) -> str:
    """Measures down, policies across, as Markdown."""
    names = list(dict.fromkeys(m.name for policy in policies for m in policy.measures))
    lines = [["measure", *(policy.policy for policy in policies)]]
    lines.append(["---"] * len(lines[0]))
    for name in names:
        found = [policy.named(name) for policy in policies]
        first = next(measure for measure in found if measure is not None)
        arrow = {"higher": " ↑", "lower": " ↓", None: ""}[first.better]
        unit = f" ({first.unit})" if first.unit not in ("", "share") else ""
        texts = [measure.text if measure is not None else "–" for measure in found]
        lines.append([f"{name}{unit}{arrow}", *texts])
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _measure(entry: Mapping[str, Any]) -> Measure:
    figures = {name: _number(entry[name]) for name in ("mean", "standard_error")}
    values = tuple((str(prompt), int(i), _number(value)) for prompt, i, value in entry["values"])
    return Measure(**{**entry, **figures, "values": values})


def _cell(text: str) -> str:
    """Names come from data and folders: nothing in them may be markup."""
    shown = "".join(c if c.isprintable() else " " for c in text).replace("\\", "\\\\")
    return html.escape(" ".join(shown.replace("|", "\\|").split()), quote=False)


def _plain(value: Any) -> Any:
    """JSON has no nan."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
