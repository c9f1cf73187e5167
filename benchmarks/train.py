"""Whole training runs, ours and TRL's: `python benchmarks/train.py [PAIRS]`.

Every case trains a LoRA adapter on the same pairs in the same order through its library's own
trainer, in a process of its own. The first step is of four short pairs: it loads what is loaded
late. The next steps are for memory, the rest against the clock (`measure.py` says why not both at
once). Cases take turns, and ratios are formed within a round.
"""

import argparse
import hashlib
import itertools
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback

import worker
from lengths import DATA
from measure import now, peak_memory, settle_malloc, start_memory
from results import Results, Setting, append, read, setting
from table import NOT_MEASURED, PAGE, against, filled, markdown
from tokenratio import packaged_model
from tokenratio.data import LengthGroupedSampler, read_rows
from trainers import CASES, Rows, Task

RESULTS = Path(__file__).with_name("train_results.csv")
_MAX_LENGTH = 320
_WEIGHTS = ("float32", "bfloat16")
_ORDERS = {"grouped": "this library's default order", "file": "the file's order"}
_MEMORY_STEPS = 2
_SHORT = {"prompt": "Say yes.", "chosen": " Yes.", "rejected": " No, no."}
_TOLERANCE = 3e-2  # of bfloat16, as in step.py
_PEERS = {"trl_dpo": (0.25, 0.40), "trl_dpo_completions": (0.45, 0.40)}  # TBPO-A's aims
_AIMS_OF = "tbpo_a"


@dataclass(frozen=True)
class TrainRow:
    """One run's reading.

    Attributes:
        workload: the pairs, in words.
        weights: dtype of the frozen base.
        order: of the pairs: `grouped` as this library does by default, or the `file`'s.
        start_seconds: from the start of the process to the first step.
        seconds: per step: batch, both models, loss, backward, optimizer, logging.
        tokens: of a step: the two rows of every pair, padding left out; the same in every case.
        peak_bytes: over what is resident before the steps: weights, adapter, optimizer.
        loss: of the first step on these pairs; `chosen_logp` the mean of the chosen responses'
            log π in it.
    """

    workload: str
    model: str
    weights: str
    order: str
    case: str
    round: int
    start_seconds: float
    seconds: float
    tokens: float
    peak_bytes: int
    loss: float
    chosen_logp: float


class Watch(TrainerCallback):
    """Times the steps of a run and reads its memory."""

    def __init__(self, launched: float, device: str) -> None:
        self.start_seconds, self._launched, self._device = 0.0, launched, device
        self.logs: list[dict[str, float]] = []
        self.peak_bytes, self._baseline = 0, 0
        self._clock, self.begins = 0.0, list[float]()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step = state.global_step
        if step == 0:
            self.start_seconds = time.time() - self._launched
        elif step == 1:
            self._baseline = start_memory(self._device == "cuda")
        elif step == 1 + _MEMORY_STEPS:
            self.peak_bytes = peak_memory(self._device == "cuda") - self._baseline
            settle_malloc()
        if step > _MEMORY_STEPS:
            self.begins.append(now(self._device))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begins.append(now(self._device))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs))

    @property
    def seconds(self) -> float:
        """Per step, from one to the next."""
        return (self.begins[-1] - self.begins[0]) / (len(self.begins) - 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="folder, or name of a package's model")
    parser.add_argument(
        "pairs", nargs="?", type=Path, default=DATA / "ultrafeedback_sample" / "train.jsonl"
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--weights", choices=_WEIGHTS, default="float32")
    parser.add_argument("--number", type=int, default=64, help="how many pairs")
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--order", choices=_ORDERS, default="file")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV to append to")
    parser.add_argument("--report", action="store_true", help="only render docs/performance.md")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return _work()
    faults = []
    if not args.report:
        faults = run(args)
    if args.results == RESULTS:
        text = PAGE.read_text(encoding="utf-8")
        for mark, device in (("training", "cpu"), ("training on cuda", "cuda")):
            text = filled(text, mark, section(RESULTS, device))
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(section(args.results, args.device))
    print(*faults, sep="\n")
    return 1 if faults else 0


def run(args: argparse.Namespace) -> list[str]:
    """Measure the cases round by round; returns which runs disagree."""
    where = setting(args.device, args.threads, "bfloat16")
    # A folder, which both libraries load.
    model = args.model if Path(args.model).is_dir() else str(packaged_model(args.model))
    grouped = args.batch if args.order == "grouped" else None
    rows, tokens = _pairs(model, args.pairs, args.number, grouped)
    workload = (
        f"the first {len(rows)} pairs of {args.pairs.parent.name} with rows of at most "
        f"{_MAX_LENGTH} tokens, {args.batch} a step, in {_ORDERS[args.order]}"
    )
    faults = []
    for number in range(args.rounds):
        readings = {}
        for case in args.cases:
            with tempfile.TemporaryDirectory() as output:
                short = [_SHORT] * args.batch
                task = Task(model, args.weights, short + rows, args.batch, output, args.device)
                reading = readings[case] = worker.measured(
                    __file__,
                    {"case": case, "launched": time.time(), "task": asdict(task)},
                    threads=args.threads,
                    name=case,
                )
            row = TrainRow(
                workload=workload,
                model=Path(args.model).name,
                weights=args.weights,
                order=args.order,
                case=case,
                round=number,
                tokens=tokens * args.batch / len(rows),
                **{name: value for name, value in reading.items() if name != "tokens_digest"},
            )
            append(args.results, where, row)
            print(
                f"round {number + 1}: {case}: {row.seconds:.2f} s a step, "
                f"{row.peak_bytes / 2**20:.0f} MiB, first step after {row.start_seconds:.0f} s",
                flush=True,
            )
        faults += _disagreements(readings)
    return faults


def _pairs(model: str, path: Path, number: int, grouped: int | None) -> tuple[Rows, int]:
    """The first pairs that fit, as text, and the tokens of all their rows.

    Left out are long rows, and prompts whose last token would merge with a response's first: the
    libraries cut such a row at different places.

    Args:
        grouped: pairs a step in this library's default order, by what is left of a pair after
            pruning; None for the file's order.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    chosen, lengths, tokens = [], [], 0
    for source in read_rows(str(path)):
        row = {name: source.fields[name] for name in ("prompt", "chosen", "rejected")}
        prompt, sides = row["prompt"], (row["chosen"], row["rejected"])
        if not all(map(str.strip, row.values())) or sides[0] == sides[1]:
            continue
        whole = [ids(prompt + side) for side in sides]
        is_split = all(w == ids(prompt) + ids(s) for w, s in zip(whole, sides, strict=True))
        if is_split and max(map(len, whole)) < _MAX_LENGTH:
            chosen.append(row)
            tokens += sum(len(w) + 1 for w in whole)  # and EOS
            lengths.append(2 * min(map(len, whole)) - len(ids(prompt)))
        if len(chosen) == number:
            break
    if grouped is not None:
        chosen = [chosen[row] for row in LengthGroupedSampler(lengths, grouped, seed=0)]
    return chosen, tokens


def _work() -> int:
    """One run from standard input, its reading to standard output."""
    job = worker.task()
    case, task = CASES[job["case"]], Task(**job["task"])
    watch, trainer = Watch(job["launched"], task.device), case.make(task)
    trainer.add_callback(watch)
    with case.around():
        trainer.train()
    first = watch.logs[1]  # on the pairs; the one before was the short batch
    reading = {
        "start_seconds": watch.start_seconds,
        "seconds": watch.seconds,
        "peak_bytes": watch.peak_bytes,
        "loss": float(first["loss"]),
        "chosen_logp": float(first["logps/chosen"]),
        "tokens_digest": _digest(trainer.train_dataset),
    }
    worker.answer(reading)
    return 0


def _digest(dataset: Dataset) -> str:
    """Of the ids that a trainer made of its rows, in their order."""
    columns = [list(dataset[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")]
    return hashlib.sha256(json.dumps(columns).encode()).hexdigest()


def _disagreements(readings: dict[str, dict[str, Any]]) -> list[str]:
    """All cases must train the same tokens, and every DPO report one loss and one log π.

    The latter to bfloat16's rounding: the first step's.
    """
    faults = []
    if len({reading.pop("tokens_digest") for reading in readings.values()}) > 1:
        faults.append("DISAGREES: the cases do not train the same tokens")
    for name in ("loss", "chosen_logp"):
        values = {case: found[name] for case, found in readings.items() if CASES[case].is_dpo}
        low, high = min(values.values(), default=0.0), max(values.values(), default=0.0)
        if not high - low <= _TOLERANCE * abs(low):
            faults.append(f"DISAGREES: {name} of the first step: {values}")
    return faults


def section(path: Path, device: str) -> str:
    """A device's newest run of each dtype of the base and each order, as Markdown."""
    rows = read(path, TrainRow) if path.exists() else []
    parts = []
    for weights, order in itertools.product(_WEIGHTS, _ORDERS):
        wanted = [pair for pair in rows if (pair[1].weights, pair[1].order) == (weights, order)]
        results = Results(wanted, device)
        runs = results.runs()
        if runs:
            parts.append(_table(results, *next(iter(runs.values()))[0]))
    return "\n\n".join(parts) or NOT_MEASURED


def _table(results: Results, where: Setting, row: TrainRow) -> str:
    rows = [found for run, found in results.rows if run.run == where.run]
    rounds = len({found.round for found in rows})
    header = ["", "s a step", "tokens/s", "peak MiB", "first step after", *map(_label, _PEERS)]
    lines = []
    for case in CASES:
        mine = [found for found in rows if found.case == case]
        if not mine:
            continue
        seconds, peak, start = (
            sorted(getattr(found, name) for found in mine)[len(mine) // 2]
            for name in ("seconds", "peak_bytes", "start_seconds")
        )
        line = [CASES[case].label, f"{seconds:.{2 if seconds > 1 else 3}f}"]
        line += [f"{row.tokens / seconds:,.0f}", f"{peak / 2**20:,.0f}", f"{start:.0f} s"]
        for peer, aims in _PEERS.items():
            is_aimed = case == _AIMS_OF and where.device == "cpu"
            is_aimed &= (row.weights, row.order) == ("float32", "file")
            bounds = aims if is_aimed else (None, None)
            ratios = [
                results.ratios(case, peer, value, "")
                for value in (lambda found: found.seconds, lambda found: found.peak_bytes)
            ]
            cells = [against(*pair) for pair in zip(ratios, bounds, strict=True) if pair[0]]
            line.append("; ".join(cells) if cells and case != peer else "–")
        lines.append(line)
    text = (
        f"Run {where.run}, commit {where.commit}, on {where.machine}, {where.threads} of "
        f"{where.cores} cores; torch {where.torch}, transformers {where.transformers}, trl "
        f"{where.trl}; {row.model} with {row.weights} weights, computing in {where.dtype}; "
        f"{row.workload}; {rounds} round{'s' * (rounds > 1)}."
    )
    return f"{text}\n\n{markdown(header, lines)}"


def _label(case: str) -> str:
    return f"time; memory ÷ {CASES[case].label}"


if __name__ == "__main__":
    sys.exit(main())
