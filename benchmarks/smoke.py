"""Every case once on tiny models: do losses and gradients agree where they must?"""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import disable_progress_bars

import jobs
import table
from cases import CASES
from lengths import token_rows
from models import MODELS, build
from results import RESULTS
from step_case import UnavailableError

# float32 sums over a few hundred terms; a wrong mask or an off-by-one moves these by percents.
_LOSS_TOLERANCE, _GRADIENT_TOLERANCE = 1e-5, 1e-3
_LENGTHS = [[(9, 12, 5), (4, 3, 8), (7, 6, 6)]]

Outcome = tuple[float, dict[str, torch.Tensor]]


def main(run: Callable[..., list[str]]) -> int:
    """0 if all agree. `run` is the measuring loop, tried end to end on a few tiny jobs."""
    warnings.simplefilter("ignore")
    disable_progress_bars()  # of trl's own data preparation
    torch.set_num_threads(1)  # tiny products: a second thread only waits
    torch.compiler.set_stance("force_eager")  # compiling Liger's loss takes longer than the rest
    skipped, faults = [], []
    for model in ("smoke", "smoke-tied", "smoke-lora"):
        outcomes: dict[str, Outcome] = {}
        for name in CASES:
            try:
                outcomes[name] = _outcome(name, model)
            except UnavailableError as error:
                skipped.append(f"skipped {name}: {error}")
        faults += _faults(model, outcomes)
        compared = [name for name in outcomes if CASES[name].agrees_with]
        print(f"{model}: {len(outcomes)} cases ran, {len(compared)} compared", flush=True)
    for line in dict.fromkeys(skipped):
        print(line)
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.csv"
        faults += run(jobs.smoke_jobs(), device="cpu", threads=1, results=results)
        page = table.page_of(results)
        table.write(results, page, plot=False)
        table.write(RESULTS, page, plot=False)
    for fault in faults:
        print(f"DISAGREES: {fault}")
    print("smoke: failed" if faults else "smoke: losses and gradients agree")
    return 1 if faults else 0


def _outcome(name: str, model: str) -> Outcome:
    spec = MODELS[model]
    models = build(spec, device="cpu", dtype=torch.float32)
    step = CASES[name].make(models)
    (rows,) = token_rows(_LENGTHS, spec.vocabulary)
    loss = step.loss(step.collate(rows))
    loss.backward()
    gradients = {n: p.grad for n, p in models.policy.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def _faults(model: str, outcomes: dict[str, Outcome]) -> list[str]:
    faults = []
    first: dict[str, str] = {}
    for name, (loss, gradients) in outcomes.items():
        group = CASES[name].agrees_with
        if group is None:
            continue
        other = first.setdefault(group, name)
        other_loss, other_gradients = outcomes[other]
        if not abs(loss - other_loss) <= _LOSS_TOLERANCE * abs(other_loss):
            faults.append(f"{model}: loss of {name} {loss:.8g}, of {other} {other_loss:.8g}")
        if gradients.keys() != other_gradients.keys():
            differing = sorted(gradients.keys() ^ other_gradients.keys())
            faults.append(f"{model}: {name} and {other} train other parameters: {differing[:3]}")
            continue
        worst = max(gradients, key=lambda n: _distance(gradients[n], other_gradients[n]))
        distance = _distance(gradients[worst], other_gradients[worst])
        if not distance <= _GRADIENT_TOLERANCE:
            faults.append(f"{model}: gradient of {worst}, {name} and {other}: {distance:.2g} apart")
    return faults


def _distance(left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    scale = right.abs().max().clamp_min(1e-12)
    return ((left - right).abs().max() / scale).item()
