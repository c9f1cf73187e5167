"""Pairs from rows that rank, rate or compare responses."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from tokenratio.data.defects import DefectKind, RowDefectError
from tokenratio.data.messages import structured, wrong_type

Fields: TypeAlias = Mapping[str, Any]


def by_rank(fields: Fields) -> dict[str, Any]:
    """The best and the worst of `answers`, by `rank` (1 is the best)."""
    answers = _objects(fields, "answers", "{answer, rank}")
    return _extremes([(_number(a.get("rank"), -1), a.get("answer")) for a in answers], "rank")


def by_rating(ratings: str) -> Callable[[Fields], dict[str, Any]]:
    """The best and the worst of `generations`, by a list of their ratings."""

    def read(fields: Fields) -> dict[str, Any]:
        generations, scores = structured(fields["generations"]), structured(fields[ratings])
        if not (
            isinstance(generations, list)
            and isinstance(scores, list)
            and len(generations) == len(scores)
        ):
            raise RowDefectError(
                DefectKind.NON_STRING_FIELD,
                f"generations and {ratings} are not lists of the same length",
            )
        scored = [(_number(s), g) for s, g in zip(scores, generations, strict=True)]
        return _extremes(scored, ratings)

    return read


def by_order(fields: Fields) -> dict[str, Any]:
    """The two `generations`, in the order of `order` (chosen, rejected)."""
    generations, order = structured(fields["generations"]), structured(fields["order"])
    if not isinstance(order, list) or not isinstance(generations, list):
        raise RowDefectError(DefectKind.NO_PREFERENCE, "order is not a list of chosen and rejected")
    if sorted(map(str, order)) != ["chosen", "rejected"] or len(generations) != 2:
        detail = f"order is {', '.join(map(str, order)) or 'empty'}"
        raise RowDefectError(DefectKind.NO_PREFERENCE, detail)
    return {name: generations[order.index(name)] for name in ("chosen", "rejected")}


def by_score(fields: Fields) -> dict[str, Any]:
    """The best and the worst of `completions`, by their overall score."""
    completions = _objects(fields, "completions", "{response, overall_score}")
    for score in ("overall_score", "score", "rating", "fine-grained_score"):
        if any(item.get(score) is not None for item in completions):
            break
    else:
        raise RowDefectError(DefectKind.NO_PREFERENCE, "completions have no overall_score or score")
    return _extremes([(_number(c.get(score)), c.get("response")) for c in completions], score)


def by_id(fields: Fields) -> dict[str, Any]:
    """Two responses, and the number of the better one."""
    name = "better_response_id" if "better_response_id" in fields else "safer_response_id"
    return _picked(fields, ("response_0", "response_1"), name, {0: 0, 1: 1})


def by_labels(fields: Fields) -> dict[str, Any]:
    """SHP: two replies to `history`; labels is 1 where A is preferred."""
    found = _picked(fields, ("human_ref_A", "human_ref_B"), "labels", {1: 0, 0: 1})
    return {"prompt": fields["history"], **found}


def by_strength(first: str, second: str, name: str) -> Callable[[Fields], dict[str, Any]]:
    """Two responses and a strength: below 0 the first is better, above 0 the second."""

    def read(fields: Fields) -> dict[str, Any]:
        strength = _number(fields[name])
        if not strength:
            raise RowDefectError(DefectKind.NO_PREFERENCE, f"{name} is {fields[name]!r}")
        better, worse = (first, second) if strength < 0 else (second, first)
        return {"chosen": fields[better], "rejected": fields[worse]}

    return read


def by_winner(first: str, second: str) -> Callable[[Fields], dict[str, Any]]:
    """Two responses and the name of the better one; ties are refused."""
    names = {"model_a": 0, "a": 0, first: 0, "model_b": 1, "b": 1, second: 1}

    def read(fields: Fields) -> dict[str, Any]:
        return _picked(fields, (first, second), "winner", names)

    return read


def _picked(
    fields: Fields, columns: tuple[str, str], name: str, meaning: Mapping[Any, int]
) -> dict[str, Any]:
    """The pair in two columns, in the order given by a third column."""
    value = fields[name]
    key = value.strip().lower() if isinstance(value, str) else value
    if isinstance(key, str) and key not in meaning:
        key = _number(key)
    better = meaning.get(key) if isinstance(key, str | int | float) else None
    if better is None:
        raise RowDefectError(DefectKind.NO_PREFERENCE, f"{name} is {value!r}")
    return {"chosen": fields[columns[better]], "rejected": fields[columns[1 - better]]}


def _objects(fields: Fields, name: str, wanted: str) -> list[Mapping[str, Any]]:
    value = structured(fields[name])
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise wrong_type(name, value, f"a list of {wanted}")
    return value


def _number(value: object, sign: int = 1) -> float | None:
    if isinstance(value, str | int | float) and value == value:
        try:
            return sign * float(value)
        except (ValueError, OverflowError):
            return None
    return None


def _extremes(scored: Sequence[tuple[float | None, Any]], name: str) -> dict[str, Any]:
    """The best and the worst response; those without a score or text are skipped."""
    found = [(score, text) for score, text in scored if score is not None and text]
    if len(found) < 2:
        detail = f"fewer than two responses have a text and a {name}"
        raise RowDefectError(DefectKind.NO_PREFERENCE, detail)
    best, worst = max(found, key=lambda item: item[0]), min(found, key=lambda item: item[0])
    if best[0] == worst[0]:
        raise RowDefectError(DefectKind.NO_PREFERENCE, f"all responses have the same {name}")
    return {"chosen": best[1], "rejected": worst[1]}
