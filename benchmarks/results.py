"""`results.csv`: one row per case and round, with the machine and versions it was measured on.

Rounds are kept apart because ratios are formed within a round, where machine noise is shared.
"""

import csv
import importlib.metadata
import os
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).with_name("results.csv")


@dataclass(frozen=True)
class Setting:
    """The machine and the versions of a run; `run` is its start in UTC and names it."""

    run: str
    commit: str
    machine: str
    cores: int
    threads: int
    torch: str
    transformers: str
    trl: str
    liger: str
    device: str
    dtype: str


@dataclass(frozen=True)
class Row:
    """One process's reading.

    Attributes:
        study: `step`, `prompt`, or what grows: `vocabulary`, `length`, `pairs`; `x` is its value.
        workload: name of the lengths, with their means.
        tokens: of the two rows of every pair, padding left out, mean over the batches.
        scored_rows: twice the tokens that TBPO compares, mean over the batches.
        seconds: per step; `head_share` of it outside the two bodies.
        peak_bytes: over the loaded models; `gradient_bytes` of it are the gradients'.
    """

    study: str
    x: int
    workload: str
    model: str
    hidden: int
    vocabulary: int
    case: str
    round: int
    seconds: float
    head_share: float
    peak_bytes: int
    gradient_bytes: int
    tokens: float
    scored_rows: float
    loss: float


class Results:
    """The rows of one device; what is read comes from the newest run that has all of it."""

    def __init__(self, rows: Iterable[tuple[Setting, Any]], device: str) -> None:
        self.rows = [(where, row) for where, row in rows if where.device == device]

    def runs(self, **fixed: object) -> dict[str, list[tuple[Setting, Row]]]:
        """Rows with these fields, by run, newest first."""
        found: dict[str, list[tuple[Setting, Row]]] = {}
        for where, row in sorted(self.rows, key=lambda pair: pair[0].run, reverse=True):
            if all(getattr(row, name) == value for name, value in fixed.items()):
                found.setdefault(where.run, []).append((where, row))
        return found

    def newest(self, *, case: str, **fixed: object) -> list[Row]:
        """All rounds of a case in the newest run that has it; empty if none has."""
        runs = self.runs(case=case, **fixed)
        return [row for _, row in next(iter(runs.values()), [])]

    def ratios(
        self, ours: str, peer: str, value: Callable[[Row], float], workload: str, **fixed: object
    ) -> list[float]:
        """`value` of one case over the other's, for each round of the newest run that has both."""
        for rows in self.runs(**fixed).values():
            rounds = {
                (row.case, row.round): value(row)
                for _, row in rows
                if row.workload.startswith(workload)
            }
            both = [
                rounds[ours, number] / rounds[peer, number]
                for case, number in rounds
                if case == ours and (peer, number) in rounds
            ]
            if both:
                return both
        return []


def setting(device: str, threads: int, dtype: str) -> Setting:
    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "absent"

    return Setting(
        run=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit=_commit(),
        machine=torch.cuda.get_device_name() if device == "cuda" else _cpu(),
        cores=os.cpu_count() or 1,
        threads=threads,
        torch=torch.__version__,
        transformers=version("transformers"),
        trl=version("trl"),
        liger=version("liger-kernel"),
        device=device,
        dtype=dtype,
    )


def append(path: Path, where: Setting, row: Any) -> None:
    """Add a row, a dataclass: `Row`, or the reading of another benchmark in a file of its own."""
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow([field.name for part in (where, row) for field in fields(part)])
        values = (*astuple(where), *astuple(row))
        writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in values])


def read(path: Path, kind: type = Row) -> list[tuple[Setting, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [(_parsed(Setting, line), _parsed(kind, line)) for line in csv.DictReader(file)]


def _parsed(kind: type, line: dict[str, str]) -> Any:
    return kind(**{field.name: field.type(line[field.name]) for field in fields(kind)})


def _commit() -> str:
    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        output = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=False
        )
        return output.stdout.strip()

    # Results and page are written by the benchmark itself and do not make the code another.
    changed = [
        line
        for line in git("status", "--porcelain", "../src", ".").splitlines()
        if not line.endswith("results.csv")
    ]
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+changes" if changed else "")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"
