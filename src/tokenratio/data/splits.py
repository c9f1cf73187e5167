"""Split names: which split a file belongs to, and which split a name refers to."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenratio.data.display import printable
from tokenratio.data.files import data_suffix
from tokenratio.errors import TokenRatioError

ALL_SPLITS = "all"
# What splits are called on the Hub, as `datasets` recognises them.
_KEYWORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SEPARATOR = re.compile(r"[-._/ 0-9]+")
# `-00000-of-00003`, also followed by a hash, `_1`, `.part-2`: pieces of one split.
_SHARD = re.compile(
    r"(?:-\d+-of-\d+(?:-[0-9a-f]{8,})?|[-_. ]+(?:part|shard|chunk)?[-_. ]*\d+)$", re.IGNORECASE
)
_DESCRIPTIONS = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}


def split_base(name: str) -> str | None:
    """`train`, `validation` or `test`, whichever the name of a split or file contains.

    >>> split_base("train_prefs"), split_base("dpo-dev"), split_base("trainer")
    ('train', 'validation', None)
    """
    words = _SEPARATOR.split(name.lower())
    return next((_KEYWORDS[word] for word in words if word in _KEYWORDS), None)


def choose_split(
    available: Sequence[str],
    wanted: str | None,
    *,
    where: str,
    prefer: str = "prefs",
    named: bool = True,
) -> str:
    """The name of the split to read.

    An exact name is taken. `train` and `test` also match the only split with that word
    (`train_prefs`), or among several the one for the purpose (`train_prefs` for pairs, `train_sft`
    for fine-tuning); `test` matches the validation split if there is no test split.

    Args:
        available: names of all splits.
        wanted: a name; None if there is only one split.
        where: the name of the source.
        prefer: the other word in the name of the preferred split.
        named: whether `where` can be followed by `@split`.
    Raises:
        TokenRatioError: no split or several match; the message lists them.
    """
    if wanted is None:
        found = list(available)
    elif wanted in available:
        found = [wanted]
    else:
        found = _matching(available, wanted, prefer)
        if not found and _canonical(wanted) == "test":
            found = _matching(available, "validation", prefer)
    if len(found) == 1:
        return found[0]
    names = sorted(found or available)
    if found and wanted is None:
        fault = f"it has several splits: {', '.join(names)}"
    elif found:
        fault = f"several splits could be {wanted!r}: {', '.join(names)}"
    else:
        fault = f"no split {wanted!r}; it has: {', '.join(names)}"
    remedy = f"Name one, for example {where}@{names[0]}" if named else "Name one in split"
    if not found and wanted is not None and "[" in wanted:
        remedy = "Slices are not supported; max_samples takes a part of the rows"
    raise TokenRatioError(printable(f"{where}: {fault}. {remedy}."))


def _matching(available: Iterable[str], wanted: str, prefer: str) -> list[str]:
    same = [name for name in available if _canonical(name) == _canonical(wanted)]
    if same or _canonical(wanted) not in _KEYWORDS.values():
        return same
    alike = [name for name in available if split_base(name) == _canonical(wanted)]
    meant = [name for name in alike if _rest(name) == [prefer]]
    return meant if len(meant) == 1 else alike


def _canonical(name: str) -> str:
    """`dev` and `data/dev` are `validation`; other names stay."""
    last = name.rpartition("/")[2]
    return _KEYWORDS.get(last.lower(), last)


def _rest(name: str) -> list[str]:
    words = _SEPARATOR.split(name.lower())
    return [word for word in words if word and word not in _KEYWORDS]


def files_of(folder: Path) -> list[Path]:
    """The data files of a folder and its subfolders, in the order of their names."""
    return sorted(
        file
        for file in folder.rglob("*")
        if (file.is_file() or file.is_symlink())  # a broken link is reported when it is read
        and data_suffix(file)
        and not file.is_dir()
        and file.name not in _DESCRIPTIONS
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def files_by_split(folder: Path, files: Iterable[Path]) -> dict[str | None, list[Path]]:
    """Files of a folder by the split in their names, or else in their subfolders' names.

    Shard numbers are dropped from a split's name; if splits are in several subfolders, these come
    first (`helpful/train`). The key None holds files of no split.
    """
    found: dict[tuple[str, ...] | None, list[Path]] = {}
    for file in files:
        found.setdefault(_place(file.relative_to(folder)), []).append(file)
    folders = [place[:-1] for place in found if place is not None]
    common = next(
        (depth for depth, names in enumerate(zip(*folders, strict=False)) if len({*names}) > 1),
        min(map(len, folders), default=0),
    )
    return {
        place if place is None else "/".join(place[common:]): group
        for place, group in found.items()
    }


def _place(path: Path) -> tuple[str, ...] | None:
    """The subfolders of a split, then its name; None for a file of no split."""
    name = path.name
    while data_suffix(Path(name)) or name.endswith(".gz"):
        name = Path(name).stem
    parts = [*path.parts[:-1], name]
    for index in reversed(range(len(parts))):
        if split_base(parts[index]):
            label = parts[index]
            while (shorter := _SHARD.sub("", label)) != label and split_base(shorter):
                label = shorter
            return (*parts[:index], _KEYWORDS.get(label.lower(), label))
    return None
