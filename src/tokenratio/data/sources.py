"""Where rows come from: files, folders, the Hub, `datasets`, lists of dicts; one or several."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tokenratio.data.arrow_rows import check_arrow
from tokenratio.data.display import printable
from tokenratio.data.files import SUFFIXES, SourceRow
from tokenratio.data.parts import SourcePart
from tokenratio.data.splits import ALL_SPLITS, choose_split, files_by_split, files_of, split_base
from tokenratio.data.worlds import Sampler, draws_from_policy, is_world_source, world_rows
from tokenratio.errors import TokenRatioError, first_line

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_ADDRESS = re.compile("[A-Za-z][A-Za-z0-9+.-]*://")
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?")


@dataclass(frozen=True)
class DataSource:
    """A source and which part of it to read; a list of these is read as one data set.

    Attributes:
        path: any source of `read_rows` except a list of sources.
        config: configuration of a Hub data set; the same as `path:config`.
        split: the same as `path@split`.
        weight: how often each row is used: 0.5 takes half of the rows, drawn by the seed; 2 takes
            each row twice; 1.5 takes all rows once and half of them again.
    """

    path: Any
    config: str | None = None
    split: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        usable = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if not usable or not 0 < self.weight < float("inf"):
            raise TokenRatioError(
                f"weight of {printable(str(self.path))} must be a positive number, not "
                f"{self.weight!r}"
            )
        is_world = isinstance(self.path, str) and is_world_source(self.path)
        if is_world and self.split is not None:
            raise TokenRatioError(
                f"{self.path}: split {self.split!r} does not apply to a world; write "
                f"{self.path}&split={self.split}"
            )


Source: TypeAlias = (
    "str | os.PathLike[str] | Dataset | DatasetDict | list[dict[str, Any]] | DataSource "
    "| Mapping[str, Any] | Sequence[Any]"
)
_SPEC_KEYS = tuple(field.name for field in fields(DataSource))
_OPTIONAL = ", ".join(_SPEC_KEYS[1:])


def read_rows(source: Source, *, split: str | None = "train") -> list[SourceRow]:
    """Read every row of a source, in order, without validating it.

    Args:
        source: one of
            - a local `.json` (array of objects), `.jsonl`, `.csv` or `.parquet` file;
            - a folder of those, read by name, subfolders included: the files of one split if they
              are named by splits (`train*`, `test*`, `validation*`), else all; or a folder written
              by `Dataset.save_to_disk`;
            - a Hub name `org/name` or `org/name:config`;
            - a synthetic world, such as `world:reviews?pairs=100` (see `data.worlds`);
            - a `datasets.Dataset` or `DatasetDict`, or a list of dicts;
            - a `DataSource`, or its fields as a dict; or a list of any of these.

            A path or name may end in `@split`, which takes precedence over `split`.
        split: see `choose_split`; None means the only one, `"all"` all of them.
    Returns:
        One `SourceRow` per row; weights are not applied.
    Raises:
        TokenRatioError: the source is missing, unreadable, or a stream; or several splits match.
    """
    return [row for part in locate(source, split=split) for row in part.rows()]


def locate(
    source: Source, *, split: str | None = "train", prefer: str = "prefs"
) -> list[SourcePart]:
    """The parts of a source that `read_rows` reads; `prefer` as in `choose_split`."""
    several = _several(source)
    specs = [(None, _spec(source))] if several is None else enumerate(map(_spec, several), 1)
    parts = [
        replace(part, weight=spec.weight)
        for number, spec in specs
        for part in _locate(spec, split, prefer, number)
    ]
    names = [name for part in parts for name, _ in part.content]
    for name in names:
        if names.count(name) > 1:
            raise TokenRatioError(
                printable(f"{name} is listed twice; to use its rows twice, give it weight: 2.")
            )
    return parts


def describe_splits(source: Source, *, split: str | None = "train") -> list[str]:
    """For each source with a choice of splits, which one is read and which are not."""
    return [line for part in locate(source, split=split) if (line := part.describe())]


def source_name(source: Source) -> str:
    """The name of a source in messages."""
    several = _several(source)
    if several is not None:
        return ", ".join(map(source_name, several))
    spec = _spec(source)
    if not isinstance(spec.path, str | os.PathLike):
        return f"a {type(spec.path).__name__}"
    config = "" if spec.config is None else f":{spec.config}"
    return printable(f"{os.fspath(spec.path)}{config}" + (f"@{spec.split}" if spec.split else ""))


def draw_worlds(source: Any, sampler: Sampler) -> Any:
    """The source with each world replaced by its rows; pairs get responses from `sampler`."""
    several = _several(source)
    if several is not None:
        return [draw_worlds(item, sampler) for item in several]
    if isinstance(source, DataSource) or _is_spec(source):
        spec = _spec(source)
        return replace(spec, path=draw_worlds(spec.path, sampler))
    is_world = isinstance(source, str) and is_world_source(source)
    return world_rows(source, sampler=sampler) if is_world else source


def needs_policy(source: Any) -> bool:
    """Whether a source, or one of several, is a world whose pairs only a policy can answer."""
    several = _several(source)
    if several is not None:
        return any(map(needs_policy, several))
    is_spec = isinstance(source, DataSource) or _is_spec(source)
    return draws_from_policy(_spec(source).path if is_spec else source)


def _several(source: object) -> Sequence[Any] | None:
    """The sources of a list of sources; None for any other source, a list of rows included."""
    if not isinstance(source, list | tuple) or not source:
        return None
    return source if all(_is_source(item) for item in source) else None


def _is_source(item: object) -> bool:
    if isinstance(item, str | os.PathLike | DataSource | list) or _is_spec(item):
        return True
    return hasattr(item, "column_names")  # a Dataset or DatasetDict, without importing them


def _is_spec(value: object) -> bool:
    """A row of data has other columns than `path` and these."""
    return isinstance(value, Mapping) and "path" in value and set(value) <= set(_SPEC_KEYS)


def _spec(source: Any) -> DataSource:
    if isinstance(source, DataSource):
        return source
    if not isinstance(source, Mapping) or hasattr(source, "column_names"):
        return DataSource(source)
    unknown = ", ".join(str(key) for key in source if key not in _SPEC_KEYS)
    if unknown or "path" not in source:
        reason = f"it has {unknown}" if unknown else "it has no path"
        raise TokenRatioError(
            printable(f"A source given as a mapping needs path and may have {_OPTIONAL}; {reason}.")
        )
    return DataSource(**source)


def _locate(
    spec: DataSource, split: str | None, prefer: str, number: int | None
) -> list[SourcePart]:
    """The parts of one source.

    Args:
        number: its place among several sources, which need longer origins; None if it is alone.
    """
    source = spec.path
    name = None
    if isinstance(source, str) and is_world_source(source):
        name, source = source, world_rows(source)
    if isinstance(source, str | os.PathLike):
        return _locate_named(os.fspath(source), spec, split, prefer, alone=number is None)
    if spec.config is not None:
        raise TokenRatioError(f"config {spec.config!r} applies only to a Hub name.")
    wanted = spec.split or split
    title = f"{wanted or 'train'}_dataset" + (f" {number}" if number is not None else "")
    if isinstance(source, list | tuple):
        return [SourcePart(name or title, ((title, source),))]
    return _locate_dataset(source, wanted, prefer, title, named=False)


def _locate_named(
    text: str, spec: DataSource, split: str | None, prefer: str, *, alone: bool
) -> list[SourcePart]:
    path, named = Path(text).expanduser(), spec.split
    if not os.path.exists(path) and _ADDRESS.match(text):
        raise TokenRatioError(f"{text} is a URL: download the file and give its path")
    if not os.path.exists(path) and "@" in text:
        text, _, named = text.rpartition("@")
        path = Path(text).expanduser()
        if spec.split not in (None, named):
            raise TokenRatioError(f"{text}: conflicting splits {named} and {spec.split}; name one.")
    wanted = named or split
    if os.path.exists(path) and spec.config is not None:
        raise TokenRatioError(f"{text}: config {spec.config!r} applies only to a Hub name.")
    if os.path.isdir(path):
        return _locate_folder(path, text, wanted, prefer, alone=alone)
    if os.path.exists(path):
        if named is not None:
            raise TokenRatioError(f"{text} is a single file and has no splits; remove {named!r}.")
        return [SourcePart(text, ((path.name if alone else text, path),))]
    hub = _HUB_NAME.fullmatch(text)
    if hub is None or not is_hub_name(text):
        raise TokenRatioError(printable(f"{text}: no such file or folder."))
    if None not in (hub["config"], spec.config) and hub["config"] != spec.config:
        raise TokenRatioError(f"{text}: conflicting config {spec.config!r}; name one.")
    return _locate_hub(hub["name"], spec.config or hub["config"], wanted, prefer)


def _locate_folder(
    folder: Path, text: str, wanted: str | None, prefer: str, *, alone: bool
) -> list[SourcePart]:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        import datasets

        saved = _load(
            f"{text} was written by save_to_disk and cannot be loaded",
            lambda: datasets.load_from_disk(str(folder)).with_format(None),
        )
        for part in saved.values() if isinstance(saved, dict) else [saved]:
            check_arrow(part.data, text)
        title = folder.name if alone else text
        return _locate_dataset(saved, wanted, prefer, title, named=True)
    files = files_of(folder)
    if not files:
        raise TokenRatioError(f"{folder}: no {', '.join(SUFFIXES)} file in this folder.")
    groups = files_by_split(folder, files)
    names = [name for name in groups if name is not None]
    split, chosen, unread = None, files, tuple[str, ...]()
    # A single file with "eval" in its name does not divide a folder into splits.
    plain = any(split_base(name) == "train" or name in ("test", "validation") for name in names)
    if wanted != ALL_SPLITS and (plain or None not in groups or wanted in names):
        split = choose_split(names, wanted, where=text, prefer=prefer)
        chosen = groups[split]
        others = [file.relative_to(folder).as_posix() for file in groups.get(None, [])]
        more = (f"{others[0]} and {len(others) - 1} more",) if len(others) > 1 else tuple(others)
        unread = (*sorted(name for name in names if name != split), *more)
    front = "" if alone else text.rstrip("/") + "/"
    content = tuple((front + file.relative_to(folder).as_posix(), file) for file in chosen)
    return [SourcePart(text, content, split, unread)]


def is_hub_name(text: str) -> bool:
    """Whether a name that is no file or folder can be that of a Hub data set."""
    names_file = text.startswith(".") or text.endswith((*SUFFIXES, ".gz"))
    return _HUB_NAME.fullmatch(text) is not None and not names_file


def _load(what: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # the Hub client raises anything from ValueError to OSError
        raise TokenRatioError(printable(f"{what}: {first_line(error)}")) from error


def _locate_hub(name: str, config: str | None, wanted: str | None, prefer: str) -> list[SourcePart]:
    import datasets

    where = name if config is None else f"{name}:{config}"
    split: str | None = None if wanted == ALL_SPLITS else wanted
    available: list[str] = []
    try:
        available = datasets.get_dataset_split_names(name, config)
    except Exception:  # loading reports the error below, unless a configuration is missing
        _check_config(name, config)
    if available and wanted != ALL_SPLITS:
        split = choose_split(available, wanted, where=where, prefer=prefer)
    what = f"{name}: no such file or folder here, and not available from the Hub"
    loaded = _load(what, lambda: datasets.load_dataset(name, config, split=split))
    if isinstance(loaded, datasets.Dataset):
        others = tuple(sorted({*available} - {split or ""}))
        content = ((f"{name}[{split or 'train'}]", loaded),)
        return [SourcePart(where, content, split, others)]
    return _locate_dataset(loaded, wanted, prefer, where, named=True)


def _check_config(name: str, config: str | None) -> None:
    """Raise `TokenRatioError` if the Hub data set has several configurations and none is named."""
    import datasets

    try:
        names = datasets.get_dataset_config_names(name)
    except Exception:
        return
    if config not in names and len(names) > 1:
        fault = "several configurations" if config is None else f"no configuration {config!r}"
        raise TokenRatioError(
            f"{name} has {fault}; available: {', '.join(names)}. Name one, for "
            f"example {name}:{names[0]}"
        )


def _locate_dataset(
    source: Any, wanted: str | None, prefer: str, title: str, *, named: bool
) -> list[SourcePart]:
    import datasets

    if isinstance(source, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise TokenRatioError(
            "Streaming (IterableDataset) is not supported: pairs are counted, shuffled and read "
            "again each epoch. Pass a Dataset, for example "
            "Dataset.from_list(list(stream.take(10_000)))."
        )
    if isinstance(source, datasets.DatasetDict):
        names = [str(name) for name in source]
        taken = names
        if wanted != ALL_SPLITS:
            where = title if named else "the DatasetDict"
            taken = [choose_split(names, wanted, where=where, prefer=prefer, named=named)]
        return [
            SourcePart(
                title,
                ((f"{title}[{name}]" if named or name != wanted else title, source[name]),),
                name,
                tuple(other for other in names if other not in taken),
            )
            for name in taken
        ]
    if not isinstance(source, datasets.Dataset):
        raise TokenRatioError(
            f"{type(source).__name__} is not a data source; pass a path, a Hub name, a "
            "datasets.Dataset or a list of dicts."
        )
    return [SourcePart(title, ((title, source),))]
