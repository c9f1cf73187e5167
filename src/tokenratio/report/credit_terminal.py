"""Pairs as two lanes of tokens for a terminal, each step of the chosen above the rejected."""

import os
import sys
import unicodedata
from collections.abc import Iterator
from shutil import get_terminal_size

import numpy as np

from tokenratio.data.display import printable, quoted
from tokenratio.report.credit_data import SIDES, InspectedPair, InspectedPolicy, Inspection
from tokenratio.report.credit_figures import robust_range

_LONGEST = 24  # characters of a token
_PROMPT = 300  # characters of a prompt
_NAMES = 10  # columns of the lanes' names
_FEWEST_COLUMNS = 40
# Backgrounds of the 256 colours for negative and positive values, the palest first.
_SHADES = {False: (223, 216, 215, 209), True: (195, 153, 117, 75)}


def terminal_lanes(inspection: Inspection, *, width: int | None = None) -> Iterator[str]:
    """Lines with every pair's tokens and their ρ; coloured by it if the output is a terminal.

    Colours are left out where the environment sets NO_COLOR. Control characters of the data are
    escaped.

    Args:
        width: columns; those of the terminal if None.
    """
    columns = max(_FEWEST_COLUMNS, width or get_terminal_size().columns)
    has_colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for policy in inspection.policies:
        values = dict(
            zip(SIDES, ([v.log_ratio for v in side] for side in policy.sides), strict=True)
        )
        largest = robust_range("rho", [{"rho": values}]) if has_colours else 0.0
        for index, pair in enumerate(inspection.pairs):
            yield from _head(inspection, policy, index)
            yield from _lanes(pair, policy, index, columns, largest)
            yield ""


def _head(inspection: Inspection, policy: InspectedPolicy, index: int) -> Iterator[str]:
    pair = inspection.pairs[index]
    chosen, rejected = policy.rewards(index, inspection.beta)
    order = "" if chosen >= rejected else " (wrongly ordered)"
    yield f"── pair {index} · {printable(pair.origin)} · {policy.name}"
    yield f"   prompt: {quoted(pair.prompt, _PROMPT)}"
    yield (
        f"   reward chosen {chosen:+.3f}, rejected {rejected:+.3f}, margin {chosen - rejected:+.3f}"
        f"{order}; T = {pair.num_shared}, first difference at step {pair.divergence}"
    )


def _lanes(
    pair: InspectedPair, policy: InspectedPolicy, index: int, columns: int, largest: float
) -> Iterator[str]:
    """Blocks of four lines: tokens and ρ of the chosen, then of the rejected response."""
    steps = max(len(pair.chosen), len(pair.rejected))
    begin = 0
    while begin < steps:
        lines = [f"{name:<{_NAMES}}" for name in ("chosen", "  ρ", "rejected", "  ρ")]
        used, step = _NAMES, begin
        while step < steps:
            cells = [_cell(pair, policy, side, index, step) for side in (0, 1)]
            size = max(_width(text) for cell in cells for text in cell[:2])
            bar = "┃" if step == pair.num_shared else " "
            if step > begin and used + size + 1 > columns:
                break
            for line, (text, figure, value) in enumerate(cells):
                lines[2 * line] += bar + _coloured(_filled(text, size), value, largest)
                lines[2 * line + 1] += bar + _filled(figure, size)
            used, step = used + size + 1, step + 1
        yield from (line.rstrip() for line in lines)
        yield ""
        begin = step


def _cell(
    pair: InspectedPair, policy: InspectedPolicy, side: int, index: int, step: int
) -> tuple[str, str, float | None]:
    """Text, figure and value of a token; empty past the response's end."""
    shown = getattr(pair, SIDES[side])
    if step >= len(shown):
        cut = f"✂{shown.cut}" if shown.cut and step == len(shown) else ""
        return cut, "", None
    text = printable(shown.tokens[step].text).replace(" ", "·")
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - 1]}…"
    value = float(policy.sides[side][index].log_ratio[step])
    return text, f"{value:+.2f}", value


def _coloured(text: str, value: float | None, largest: float) -> str:
    if value is None or not np.isfinite(value) or not largest:
        return text
    shades = _SHADES[value > 0]
    shade = int(min(1.0, abs(value) / largest) * (len(shades) + 1)) - 1
    if shade < 0:
        return text
    return f"\x1b[30;48;5;{shades[min(shade, len(shades) - 1)]}m{text}\x1b[0m"


def _width(text: str) -> int:
    """Columns of a text in a terminal."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    marks = sum(unicodedata.category(character) in ("Mn", "Me") for character in text)
    return len(text) + wide - marks


def _filled(text: str, size: int) -> str:
    return text + " " * (size - _width(text))
