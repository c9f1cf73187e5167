"""Renders `docs/performance.md` from the results: `python benchmarks/table.py`."""

import re
from pathlib import Path
from statistics import median

from cases import CASES
from jobs import PRODUCT
from models import MODELS
from plot import draw
from results import RESULTS, Results, Row, read
from targets import TARGETS, Bound, Target

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
NOT_MEASURED = "*not yet measured*"
_GROWTH = {"vocabulary": "vocabulary", "length": "longer response (tokens)", "pairs": "pairs"}
_GROWTH_CASES = ("tbpo_a", "trl_dpo_completions")
# Products of [rows, hidden] with the head in one TBPO-A step: both models' logits, and the
# gradients of states and head; a frozen head (LoRA) needs no gradient.
_HEAD_PRODUCTS, _FROZEN_HEAD_PRODUCTS = 4, 3


def page_of(results: Path) -> Path:
    """The page that documents the results; for a trial's results, a copy next to them."""
    if results == RESULTS:
        return PAGE
    page = results.with_suffix(".md")
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    return page


def write(results: Path, page: Path = PAGE, *, plot: bool = True) -> None:
    """Replace what stands between the page's markers; draw the plot if any growth was measured."""
    rows = read(results) if results.exists() else []
    cpu, cuda = Results(rows, "cpu"), Results(rows, "cuda")
    text = page.read_text(encoding="utf-8")
    for name, body in (
        ("setting", _setting(cpu)),
        ("targets", _targets(cpu, ("32k", "128k"))),
        ("cases", _cases(cpu, ("32k", "128k"))),
        ("growth", _growth(cpu)),
        ("cuda", _cuda(cuda)),
    ):
        text = filled(text, name, body)
    page.write_text(text, encoding="utf-8")
    if plot and any(row.study in _GROWTH for _, row in cpu.rows):
        draw(cpu, page.with_suffix(".svg"))


def filled(text: str, name: str, body: str) -> str:
    """The page's text with `body` between the markers of this name."""
    pattern = f"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
    text, count = re.subn(
        pattern, lambda match: f"{match[1]}{body}\n{match[2]}", text, flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit(f"{PAGE} has no place for the table {name!r}")
    return text


def _setting(results: Results) -> str:
    if not results.rows:
        return NOT_MEASURED
    where = max((where for where, _ in results.rows), key=lambda where: where.run)
    lines = [
        f"Newest run {where.run}, commit {where.commit}, on {where.machine}, {where.threads} of "
        f"{where.cores} cores; torch {where.torch}, transformers {where.transformers}, trl "
        f"{where.trl}, liger-kernel {where.liger}; {where.dtype}. Batches:",
        "",
    ]
    drawn = {
        row.workload: None
        for run, row in results.rows
        if run.commit == where.commit and row.study in ("step", "prompt")
    }
    return "\n".join([*lines, *(f"- {workload}" for workload in drawn)])


def _targets(results: Results, models: tuple[str, ...]) -> str:
    header = ["time; peak memory over the weights", *(_model_label(m) for m in models)]
    lines = [[target.label, *(_reached(results, target, m) for m in models)] for target in TARGETS]
    # On a GPU fewer rows are measured, and none has a bound.
    shown = [line for line in lines if any(cell != NOT_MEASURED for cell in line[1:])]
    return markdown(header, shown or lines)


def _reached(results: Results, target: Target, model: str) -> str:
    bound = target.bounds.get(model)
    place = {"study": target.study, "model": model}
    pair = (target.ours, target.peer)
    where = target.workload or ""
    time = results.ratios(*pair, lambda row: row.seconds, where, **place)
    memory = results.ratios(*pair, lambda row: row.peak_bytes, where, **place)
    if not time:
        return f"{NOT_MEASURED}{_wanted(bound)}"
    parts = [against(time, bound[0] if bound else None)]
    parts.append(against(memory, bound[1] if bound else None))
    return "; ".join(parts)


def _wanted(bound: Bound) -> str:
    if bound is None:
        return ""
    return " (target " + "; ".join(f"≤ {value:.2f}" for value in bound if value is not None) + ")"


def against(ratios: list[float], bound: float | None) -> str:
    reached = median(ratios)
    shown = f"{reached:.2f}"
    if len(ratios) > 1 and f"{min(ratios):.2f}" != f"{max(ratios):.2f}":
        shown += f" [{min(ratios):.2f}–{max(ratios):.2f}]"
    if bound is None:
        return shown
    # What is printed is what is judged: 0.204 counts as 0.20.
    met = round(reached, 2) <= bound
    return f"{shown} (≤ {bound:.2f}{'' if met else ', **missed**'})"


def _cases(results: Results, models: tuple[str, ...]) -> str:
    header = ["model", "case", "seconds per step", "÷ bodies", "head and loss", "peak memory (MiB)"]
    lines = []
    for model in models:
        for case in CASES:
            rows = results.newest(case=case, study="step", model=model)
            if not rows:
                continue
            floor = results.ratios(
                case, "body", lambda row: row.seconds, "", study="step", model=model
            )
            lines.append(
                [
                    model,
                    CASES[case].label,
                    f"{median(row.seconds for row in rows):.2f}",
                    f"{median(floor):.2f}" if floor else "–",
                    f"{median(row.head_share for row in rows):.0%}",
                    f"{median(row.peak_bytes for row in rows) / 2**20:,.0f}",
                ]
            )
    return markdown(header, lines) if lines else NOT_MEASURED


def _growth(results: Results) -> str:
    labels = [CASES[case].label for case in _GROWTH_CASES]
    header = ["grows", "from → to", "tokens", *(f"{label}: time; memory" for label in labels)]
    lines = []
    for study, name in _GROWTH.items():
        values = sorted({row.x for _, row in results.rows if row.study == study})
        if len(values) < 2:
            continue
        first, last = values[0], values[-1]
        line = [name, f"{first:,} → {last:,} (×{last / first:g})"]
        ends = [results.newest(case="tbpo_a", study=study, x=x) for x in (first, last)]
        line.append(f"×{ends[1][0].tokens / ends[0][0].tokens:.1f}" if all(ends) else "–")
        for case in _GROWTH_CASES:
            ends = [results.newest(case=case, study=study, x=x) for x in (first, last)]
            line.append("; ".join(_growth_of(*ends)) if all(ends) else NOT_MEASURED)
        lines.append(line)
    return markdown(header, lines) if lines else NOT_MEASURED


def _growth_of(first: list[Row], last: list[Row]) -> tuple[str, str]:
    """How much time grew, and the memory at both ends."""
    seconds = [median(row.seconds for row in rows) for rows in (first, last)]
    # A model's gradients grow with its vocabulary however the step is made.
    memory = [median(row.peak_bytes - row.gradient_bytes for row in rows) for rows in (first, last)]
    return (
        f"×{seconds[1] / seconds[0]:.1f}",
        " → ".join(f"{value / 2**20:,.0f}" for value in memory) + " MiB",
    )


def _cuda(results: Results) -> str:
    if not results.rows:
        return NOT_MEASURED
    models = [m for m in MODELS if any(row.model == m for _, row in results.rows)]
    where = max((where for where, _ in results.rows), key=lambda where: where.run)
    lines = [
        f"Newest run {where.run}, commit {where.commit}, on {where.machine}; torch {where.torch}, "
        f"transformers {where.transformers}, trl {where.trl}, liger-kernel {where.liger}; "
        f"{where.dtype}.",
        "",
        _targets(results, tuple(models)),
        "",
        _cases(results, tuple(models)),
        "",
    ]
    return "\n".join([*lines, *(_head_rate(results, model) for model in models)])


def _head_rate(results: Results, model: str) -> str:
    """The head's products per second in a TBPO-A step, against the bare product's."""
    place = {"study": "step", "model": model}
    steps = results.newest(case="tbpo_a", **place)
    products = results.newest(case=PRODUCT, **place)
    if not steps or not products:
        return f"- {model}: rate of the head {NOT_MEASURED}"
    count = _HEAD_PRODUCTS if MODELS[model].lora_rank is None else _FROZEN_HEAD_PRODUCTS

    def rate(row: Row, number: int, seconds: float) -> float:
        return number * 2 * row.scored_rows * row.hidden * row.vocabulary / seconds / 1e12

    head = median(rate(row, count, row.seconds * row.head_share) for row in steps)
    bare = median(rate(row, 1, row.seconds) for row in products)
    return (
        f"- {model}: head and loss of a TBPO-A step at {head:.0f} TFLOP/s, {head / bare:.0%} of "
        f"the {bare:.0f} TFLOP/s measured for the bare product"
    )


def _model_label(name: str) -> str:
    spec = MODELS[name]
    parts = [f"hidden {spec.hidden:,}", f"{spec.layers} layers", f"V {spec.vocabulary:,}"]
    parts.append("tied" if spec.tied else "untied")
    if spec.lora_rank is not None:
        parts.append(f"LoRA r {spec.lora_rank}")
    return ", ".join(parts)


def markdown(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    write(RESULTS)
