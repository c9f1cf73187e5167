"""The token-credit viewer: an inspection as one HTML page."""

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokenratio.data.display import printable
from tokenratio.errors import TokenRatioError
from tokenratio.report.credit_data import (
    SIDES,
    InspectedPair,
    InspectedPolicy,
    Inspection,
    alternatives,
    rounded,
)
from tokenratio.report.credit_figures import (
    STEP_METRICS,
    Everywhere,
    PolicyFigures,
    by_position,
    robust_range,
)
from tokenratio.report.credit_places import PAGE_TITLE, require_own_page
from tokenratio.report.page import LARGEST_PAGE, embedded_json, render_page, write_page

# What the page can show: of every token, or of a method at every step (`step`) or for every token
# of either side (`side`). Key, label, of what, which signs it has, unit, help.
_METRICS = (
    ("rho", "ρ = log π/π_ref", "token", "±", "nats", "above 0 the policy likes the token more"),
    (
        *("log_r", "log R", "step", "±", "nats · β"),
        "β (ρ rejected − ρ chosen + log w); training pushes it down",
    ),
    ("log_w", "log w", "step", "±", "nats", "the state weight, before β"),
    ("slope", "dℓ/du", "step", "+", "", "the weight of the step in the gradient"),
    ("loss", "loss of the step", "step", "±", "", "ℓ at log R"),
    ("push", "−∂loss/∂log π", "side", "±", "", "above 0 the method raises the token's probability"),
    ("kl", "KL(π_ref ‖ π)", "token", "+", "nats", "at the token's state, over the vocabulary"),
    ("entropy", "entropy of π", "token", "+", "nats", "at the token's state"),
    ("ref", "log π_ref", "token", "−", "nats", "how likely the token is to the reference"),
    ("value", "value", "token", "±", "reward", "what the world knows of the token"),
)
_OF_METHODS = (*STEP_METRICS, "push")
# Alternatives less likely than this to both models are left out, in thousandths.
_LEAST_LIKELY = 2
_OVERVIEW = 160  # characters of a title in the list
_KINDS = {"text": "t", "part": "p", "special": "s", "end": "e"}


def write_credit_page(inspection: Inspection, path: str | Path) -> list[str]:
    """Write the page; returns notes on what it leaves out.

    A page has at most `LARGEST_PAGE` bytes. If the alternatives of all pairs do not fit, those of
    the pairs with the smallest |margin| are left out.

    Raises:
        TokenRatioError: the page is too large without alternatives too, would replace a file that
            is no page of the viewer, or cannot be written.
    """
    path, notes = Path(path), list(inspection.notes)
    require_own_page(path)
    figures = [PolicyFigures(inspection, policy) for policy in inspection.policies]
    words = _Words()
    packs: dict[str, Any] = {
        "pairs": [_packed(_pair(pair)) for pair in inspection.pairs],
        "policies": [
            [_packed(each.of_pair(i)) for i in range(len(inspection.pairs))] for each in figures
        ],
        "alternatives": [[None] * len(inspection.pairs) for _ in figures],
    }
    everywhere = [each.everywhere() for each in figures]
    page = _render(inspection, figures, everywhere, packs, words, notes)
    room = LARGEST_PAGE - len(page.encode()) - 1000  # for the note
    if room < 0:
        raise TokenRatioError(
            f"{path}: the page would have {(LARGEST_PAGE - room) / 1e6:.1f} MB, more than "
            f"{LARGEST_PAGE / 1e6:.0f} MB: lower --num_pairs ({len(inspection.pairs)}), or show "
            "fewer --losses or policies"
        )
    order = sorted(range(len(inspection.pairs)), key=figures[-1].margin, reverse=True)
    for kept, index in enumerate(order):
        before = words.size
        added = [
            _packed(_alternatives(inspection, policy, index, words))
            for policy in inspection.policies
        ]
        room -= sum(map(len, added)) + words.size - before
        if room < 0:
            notes.append(
                f"alternatives are shown for the {kept} of {len(order)} pairs with the largest "
                "|margin|: those of all do not fit into one page"
            )
            break
        for number, pack in enumerate(added):
            packs["alternatives"][number][index] = pack
    write_page(path, _render(inspection, figures, everywhere, packs, words, notes))
    return notes[len(inspection.notes) :]


class _Words:
    """Every text of an alternative once, and its number."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.size = 0

    def number(self, text: str) -> int:
        if text not in self.numbers:
            self.numbers[text] = len(self.numbers)
            self.size += len(embedded_json(text).encode()) + 1
        return self.numbers[text]


def _pair(pair: InspectedPair) -> dict[str, Any]:
    """What of a pair depends on no policy."""
    found: dict[str, Any] = {
        "prompt": pair.prompt,
        "prompt_cut": pair.prompt_cut,
        "shared": pair.num_shared,
        "divergence": pair.divergence,
    }
    for side in SIDES:
        shown = getattr(pair, side)
        found[side] = {
            "texts": [token.text for token in shown.tokens],
            "kinds": "".join(_KINDS[token.kind] for token in shown.tokens),
            "cut": shown.cut,
        }
        if shown.value is not None:
            found[side]["value"] = rounded(shown.value)
    return found


def _alternatives(
    inspection: Inspection, policy: InspectedPolicy, index: int, words: _Words
) -> dict[str, Any]:
    """At each token the number of each word, and how likely it is to both models."""
    found = {}
    for side, values in zip(SIDES, policy.sides, strict=True):
        found[side] = [
            [
                [words.number(inspection.texts.of_token(id)), *shares]
                for id, *log_probs in likeliest
                if max(shares := [round(1000 * float(np.exp(p))) for p in log_probs])
                >= _LEAST_LIKELY
            ]
            for likeliest in alternatives(values[index])
        ]
    return found


def _render(
    inspection: Inspection,
    figures: Sequence[PolicyFigures],
    everywhere: Sequence[Everywhere],
    packs: Mapping[str, Any],
    words: _Words,
    notes: Sequence[str],
) -> str:
    places = {place for found in everywhere for place in found}
    known = {place.rpartition("/")[2] for place in places}
    metrics = [
        dict(zip(("key", "label", "of", "sign", "unit", "help"), metric, strict=True))
        | ({"label": inspection.value_name or ""} if metric[0] == "value" else {})
        for metric in _METRICS
        if metric[0] in known
    ]
    view = {
        "beta": inspection.beta,
        "metrics": metrics,
        "methods": [
            {
                "name": shown.name,
                "settings": f"beta {shown.settings['beta']:g}" if "beta" in shown.settings else "",
                "local": shown.method.is_local,
                "metrics": [key for key in _OF_METHODS if f"{shown.name}/{key}" in places],
            }
            for shown in inspection.methods
        ],
        "policies": [policy.name for policy in inspection.policies],
        "pairs": [
            {
                "origin": pair.origin,
                "title": pair.title[:_OVERVIEW],
                "lengths": [len(pair.chosen), len(pair.rejected)],
                "cut": [pair.chosen.cut, pair.rejected.cut],
            }
            for pair in inspection.pairs
        ],
        "figures": [each.overview() for each in figures],
        "ranges": {place: robust_range(place, everywhere) for place in places},
        "positions": [
            {
                place: {side: by_position(values) for side, values in sides.items()}
                for place, sides in found.items()
            }
            for found in everywhere
        ],
        "words": list(words.numbers),
    }
    last = inspection.policies[-1].name
    return render_page(
        "credit.html.j2",
        title=f"{PAGE_TITLE} {last}",
        facts=printable(
            f"{len(inspection.pairs)} pairs of {inspection.source}; reference "
            f"{inspection.reference}; rewards are β Σρ with β = {inspection.beta:g}"
        ),
        notes=[printable(note) for note in notes],
        data={"view": view, "packs": packs},
        styles=["credit.css"],
        scripts=[
            *("credit_store.js", "credit_text.js", "credit_chart.js", "credit_lanes.js"),
            *("credit_detail.js", "credit_table.js", "credit.js"),
        ],
    )


def _packed(value: Any) -> str:
    """JSON, compressed; a pair is unpacked when it is opened."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()
