"""`tokenratio methods`: what each method compares, needs and costs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenratio.cli.command import Command
from tokenratio.settings import option

if TYPE_CHECKING:
    from tokenratio.losses import Method

USAGE = """usage: tokenratio methods [--markdown true]

Lists all methods that `loss` can be set to. R_t is the ratio of rejected to chosen at step t
(docs/method.md §2).
"""
_NEEDS = {
    "ref_log_probs": "reference",
    "kl_ref_policy": "KL",
    "baseline": "state baseline",
    "contrast": "token scores",
}
_HEADER = ("loss", "level", "compares", "needs", "settings and defaults", "cost", "source")


@dataclass(frozen=True)
class MethodsOptions:
    """The options of `methods`."""

    markdown: bool = option(False, "Print the Markdown table of docs/methods.md.")


def print_methods(options: MethodsOptions) -> None:
    """Print every method, as paragraphs or as a table."""
    print(markdown_table() if options.markdown else listing())


COMMAND = Command(USAGE, print_methods, options=MethodsOptions)


def markdown_table() -> str:
    """One row per method; `docs/methods.md` contains it unchanged."""
    lines = [_HEADER, ("---",) * len(_HEADER), *_rows()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def listing() -> str:
    """One paragraph per method, narrow enough for a terminal."""
    width = max(map(len, _HEADER))
    paragraphs = []
    for name, *cells in _rows():
        lines = [name]
        lines += [
            f"  {label:{width}}  {cell}" for label, cell in zip(_HEADER[1:], cells, strict=True)
        ]
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


def _rows() -> list[tuple[str, ...]]:
    from tokenratio.losses import METHODS

    return [
        (
            name,
            method.level,
            _compared(method),
            ", ".join(text for need, text in _NEEDS.items() if need in method.needs) or "–",
            ", ".join(f"{key} {_text(value)}" for key, value in method.settings.items()) or "–",
            method.cost,
            method.source,
        )
        for name, method in METHODS.items()
    ]


def _compared(method: "Method") -> str:
    """Generator × state weight × aggregation, for a ratio-matching loss."""
    from tokenratio.losses import RatioMatching

    if not isinstance(method, RatioMatching):
        return "its own loss"
    generator = "any generator" if "generator" in method.settings else "logistic"
    aggregation = {
        "mean": "mean over T of ℓ(R_t)",
        "sum": "sum over T of ℓ(R_t)",
        "sequence": "ℓ(Π R_t), whole responses",
    }[method.aggregation]
    return f"{generator} × {method.state_weight} × {aggregation}"


def _text(value: Any) -> str:
    from tokenratio.bregman import BregmanGenerator

    if not isinstance(value, BregmanGenerator):
        return f"{value:g}"
    parameters = ", ".join(f"{number:g}" for number in vars(value).values())
    return f"{value.name}({parameters})" if parameters else value.name
