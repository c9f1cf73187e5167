"""Worlds with known rewards, and data sources that name them.

A world source is `world:NAME?KIND=NUM&OPTION=VALUE…`, KIND one of `pairs`, `corpus`, `prompts`:

    world:reviews?pairs=2000&seed=1&flip_rate=0.1
    world:reviews?corpus=5000&seed=0
    world:sentiment?prompts=100&split=test
    world:harmlessness?prompts=100&file=hh/test.jsonl
"""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tokenratio.data.worlds.harmlessness import HarmlessnessWorld
from tokenratio.data.worlds.pairs import Sampler, WorldPrompt
from tokenratio.data.worlds.protocol import ResponseMeasure, TokenValues, WordValue, World
from tokenratio.data.worlds.reviews import ReviewWorld
from tokenratio.data.worlds.sentiment import SentimentWorld
from tokenratio.errors import TokenRatioError
from tokenratio.names import suggestion

WORLDS: dict[str, World] = {
    "reviews": ReviewWorld(),
    "sentiment": SentimentWorld(),
    "harmlessness": HarmlessnessWorld(),
}

__all__ = [
    "WORLDS",
    "ResponseMeasure",
    "Sampler",
    "TokenValues",
    "WordValue",
    "World",
    "WorldPrompt",
    "draws_from_policy",
    "is_world_source",
    "world_of",
    "world_rows",
]

_OPTIONS: dict[str, dict[str, Callable[[str], Any]]] = {
    "pairs": {"seed": int, "split": str, "temperature": float, "flip_rate": float},
    "corpus": {"seed": int, "split": str},
    "prompts": {"seed": int, "split": str},
}


def is_world_source(source: str) -> bool:
    """Whether a data source names a world."""
    return source.startswith("world:")


def world_of(source: str) -> World:
    """The world that a source (`world:NAME?...`) or a tokenizer (`world:NAME`) names.

    Raises:
        TokenRatioError: there is no such world.
    """
    return WORLDS[_known(urlsplit(source).path, WORLDS, "world", source)]


def draws_from_policy(source: object) -> bool:
    """Whether a source's rows need a policy's responses: pairs of a world that has none."""
    if not isinstance(source, str) or not is_world_source(source):
        return False
    name, kind, *_ = _parse(source)
    return kind == "pairs" and not WORLDS[name].has_responses


def world_rows(source: str, *, sampler: Sampler | None = None) -> list[dict[str, Any]]:
    """The rows of a world source; `seed` is 0 if not given.

    Args:
        sampler: where the responses of pairs come from; the world's own distribution if None, or
            an error if it has none.
    Returns:
        For `pairs`, preference rows; for `corpus`, rows with prompt and completion; for `prompts`,
        rows with a prompt.
    """
    # Cached, because a run reads a source several times; except with a file, which may change.
    is_fixed = sampler is None and not world_of(source).own_options
    rows = _own_rows(source) if is_fixed else _rows(source, sampler)
    return [dict(row) for row in rows]


def _rows(source: str, sampler: Sampler | None) -> list[dict[str, Any]]:
    name, kind, num, options = _parse(source)
    world = WORLDS[name]
    if kind == "pairs":
        return world.preference_pairs(num, **options, sampler=sampler)
    if kind == "corpus":
        return world.sft_corpus(num, **options)
    return [{"prompt": prompt} for prompt in world.prompts(num, **options)]


@lru_cache(maxsize=4)
def _own_rows(source: str) -> list[dict[str, Any]]:
    return _rows(source, None)


def _parse(source: str) -> tuple[str, str, int, dict[str, Any]]:
    parts = urlsplit(source)
    name = _known(parts.path, WORLDS, "world", source)
    given = parse_qsl(parts.query, keep_blank_values=True)
    values = dict(given)
    if len(values) < len(given):
        raise TokenRatioError(f"{source}: duplicate option")
    own = WORLDS[name].own_options
    kinds = [key for key in values if key in _OPTIONS]
    if len(kinds) != 1:
        for key in values:  # report a misspelt kind as such
            _known(key, {*_OPTIONS, *_OPTIONS["pairs"], *own}, "option", source)
        raise TokenRatioError(f"{source}: needs exactly one of {', '.join(_OPTIONS)}")
    kind = kinds[0]
    readers: dict[str, Callable[[str], Any]] = {kind: int, **_OPTIONS[kind]}
    readers |= dict.fromkeys(own, str)
    options: dict[str, Any] = {"seed": 0}
    for key, value in values.items():
        read = readers[_known(key, readers, f"option of {kind}", source)]
        try:
            options[key] = read(value)
        except ValueError:
            wanted = "a whole number" if read is int else "a number"
            raise TokenRatioError(f"{source}: {key} must be {wanted}, not {value!r}") from None
    num = options.pop(kind)
    if num < 1:
        raise TokenRatioError(f"{source}: {kind} must be at least 1, not {num}")
    return name, kind, num, options


def _known(name: str, known: Iterable[str], what: str, source: str) -> str:
    known = sorted(known)
    if name not in known:
        raise TokenRatioError(f"{source}: no {what} {name!r}{suggestion(name, known)}")
    return name
