"""Time and memory of one training step, ours and its peers': `python benchmarks/step.py`.

A step is the forward passes of policy and reference, the loss and the backward pass; no optimizer.
Every reading is made in a process of its own. Cases take turns: one round measures each once, so
that whatever else the machine does falls on all alike, and ratios are formed within a round.
"""

import argparse
import os
import sys
import warnings
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import jobs
import table
import worker
from cases import CASES
from jobs import Job
from lengths import token_rows
from measure import measure, product_seconds
from models import ModelSpec, build, gradient_bytes
from results import RESULTS, Row, Setting, append, setting
from step_case import UnavailableError

_CPU_MODELS, _CUDA_MODELS = ("32k", "128k"), ("8b-8-layers", "8b-8-layers-lora")
_PRODUCT_ROWS = 2048


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*CASES, jobs.PRODUCT]
    parser.add_argument("--smoke", action="store_true", help="every case once, tiny; losses agree?")
    parser.add_argument("--report", action="store_true", help="only render docs/performance.md")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="CASE")
    parser.add_argument("--models", nargs="+", choices=_CPU_MODELS + _CUDA_MODELS, metavar="MODEL")
    parser.add_argument("--studies", nargs="+", choices=jobs.STUDIES, default=jobs.STUDIES)
    parser.add_argument("--repeats", type=int, default=5, help="rounds; growth takes one")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        help="the CSV to append to; page and plot of any but the default are written next to it",
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return _work()
    if args.smoke:
        import smoke

        return smoke.main(run)
    if not args.report:
        if args.device == "cuda":
            todo = jobs.cuda_jobs(args.models or _CUDA_MODELS, args.cases, args.repeats)
        else:
            models = args.models or _CPU_MODELS
            todo = jobs.cpu_jobs(args.studies, models, args.cases, args.repeats)
        faults = run(todo, device=args.device, threads=args.threads, results=args.results)
    else:
        faults = []
    table.write(args.results, table.page_of(args.results))
    print(*faults, sep="\n")
    return 1 if faults else 0


def run(todo: list[Job], *, device: str, threads: int, results: Path) -> list[str]:
    """Measure all jobs and append to `results`; returns which losses disagree.

    Jobs on the same batches and model take turns; only their ratios are formed.
    """
    dtype = "bfloat16" if device == "cuda" else "float32"
    where = setting(device, threads, dtype)
    faults = []
    for _, group in groupby(todo, key=lambda job: (job.study, job.x, job.model, job.workload)):
        left = list(group)
        for number in range(left[0].rounds):
            losses: dict[str, float] = {}
            for job in list(left):
                name = f"{job.study} {job.x or ''} {job.model} {job.case}".replace("  ", " ")
                reading = _measured(job, where)
                if "skipped" in reading:
                    print(f"skipped {name}: {reading['skipped']}", flush=True)
                    left.remove(job)
                    continue
                append(results, where, _row(job, number, reading))
                megabytes = reading["peak_bytes"] / 2**20
                print(
                    f"round {number + 1}: {name}: {reading['seconds']:.3f} s, {megabytes:.0f} MiB",
                    flush=True,
                )
                losses[job.case] = reading["loss"]
            faults += _disagreements(losses, where.dtype)
    return faults


def _disagreements(losses: dict[str, float], dtype: str) -> list[str]:
    """Cases that take the same step must report the same loss, to rounding."""
    tolerance = 1e-4 if dtype == "float32" else 3e-2
    faults, first = [], {}
    for case, loss in losses.items():
        group = CASES[case].agrees_with if case in CASES else None
        if group is None:
            continue
        other = first.setdefault(group, case)
        if not abs(loss - losses[other]) <= tolerance * abs(losses[other]):
            faults.append(f"DISAGREES: loss of {case} {loss:.6g}, of {other} {losses[other]:.6g}")
    return faults


def _row(job: Job, number: int, reading: dict[str, Any]) -> Row:
    rows = _PRODUCT_ROWS
    tokens = fmean(sum(2 * p + c + r for p, c, r in batch) for batch in job.batches)
    scored = fmean(sum(2 * min(c, r) for _, c, r in batch) for batch in job.batches)
    return Row(
        study=job.study,
        x=job.x,
        workload=job.workload,
        model=job.model,
        hidden=job.spec.hidden,
        vocabulary=job.spec.vocabulary,
        case=job.case,
        round=number,
        tokens=rows if job.case == jobs.PRODUCT else tokens,
        scored_rows=rows if job.case == jobs.PRODUCT else scored,
        **reading,
    )


def _measured(job: Job, where: Setting) -> dict[str, Any]:
    task = asdict(job) | {"device": where.device, "dtype": where.dtype, "threads": where.threads}
    name = f"{job.case} on {job.model}"
    return worker.measured(__file__, task, threads=where.threads, name=name)


def _work() -> int:
    """One job from standard input, its reading to standard output."""
    import torch

    warnings.simplefilter("ignore")
    task = worker.task()
    torch.set_num_threads(task["threads"])
    dtype, device = getattr(torch, task["dtype"]), task["device"]
    spec = ModelSpec(**task["spec"])
    try:
        reading = _reading(task, spec, device, dtype)
    except UnavailableError as error:
        reading = {"skipped": str(error)}
    except torch.cuda.OutOfMemoryError:
        reading = {"skipped": "out of memory"}
    worker.answer(reading)
    return 0


def _reading(task: dict[str, Any], spec: ModelSpec, device: str, dtype: Any) -> dict[str, Any]:
    if task["case"] == jobs.PRODUCT:
        seconds = product_seconds(_PRODUCT_ROWS, spec.hidden, spec.vocabulary, device, dtype)
        nothing = {"head_share": 1.0, "peak_bytes": 0, "gradient_bytes": 0, "loss": 0.0}
        return {"seconds": seconds} | nothing
    models = build(spec, device=device, dtype=dtype)
    step = CASES[task["case"]].make(models)
    reading = measure(step, models, token_rows(task["batches"], spec.vocabulary), repeats=1)
    return asdict(reading) | {"gradient_bytes": gradient_bytes(models)}


if __name__ == "__main__":
    sys.exit(main())
