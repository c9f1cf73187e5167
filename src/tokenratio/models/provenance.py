"""What a model was assembled from, and where its parts are now.

An adapter needs its base, but its folder only names it: a hub repository, or a folder that may be
on another machine or relative to another working directory.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from torch import nn
from transformers.utils.peft_utils import find_adapter_config_file

from tokenratio.errors import TokenRatioError
from tokenratio.models.gguf import is_gguf, quantisation
from tokenratio.models.packages import PREFIX, is_package, package_of, packaged_model
from tokenratio.models.pretrained_arguments import WHERE_KWARGS
from tokenratio.records import read_record
from tokenratio.run_folder import RUN_FILE, read_document

ADAPTER_FILE = "adapter_config.json"
# The arguments about where to find files that apply to only one repository.
_OF_ONE_REPOSITORY = ("revision", "subfolder")
MODEL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# First parts of relative paths: an adapter with the base `models/sft` was trained on a folder, not
# on the repository of a hub organisation.
_FOLDER_NAMES = frozenset(
    (
        *("model", "models", "checkpoint", "checkpoints", "ckpt", "ckpts", "weights", "adapters"),
        *("output", "outputs", "run", "runs", "result", "results", "saved", "saves", "tmp"),
        "experiments",
    )
)
_CHECKPOINT = re.compile(r"(checkpoint|step|epoch|global_step)[-_]?\d+")


@dataclass(frozen=True)
class Origin:
    """What a model was assembled from.

    Attributes:
        name: a folder, GGUF file or hub name that loads all of it; "" if there is none.
        base: the same of the model without adapters; "" if there is none.
        adapters: the adapters on it, in order: folders, hub names, or a few words.
    """

    name: str
    base: str
    adapters: tuple[str, ...] = ()

    def __str__(self) -> str:
        base = described(self.base) or "a model without a name"
        return " on ".join([*reversed(self.adapters), base])

    def as_dict(self) -> dict[str, Any]:
        """As recorded in run.json."""
        package = package_of(self.name)
        name = self.name if package is None else f"{PREFIX}{package.name}"
        return {"path": name, "base": described(self.base), "adapters": list(self.adapters)}


def origin_of(model: nn.Module) -> Origin:
    """What `model`, with or without an adapter, was assembled from, as far as is known."""
    wrapper: Any = model
    inner = wrapper.get_base_model() if hasattr(model, "get_base_model") else wrapper
    known: Origin | None = getattr(inner, "tokenratio_origin", None)
    if known is not None:
        return known
    name = absolute(inner.config.name_or_path or "")
    configs: Mapping[str, Any] = getattr(inner, "peft_config", {})
    adapters = tuple(f"{config.peft_type.value} {key!r}" for key, config in configs.items())
    return Origin("" if adapters else name, name, adapters)


def set_origin(model: nn.Module, origin: Origin) -> None:
    """Record what a causal language model was assembled from; deep copies keep it."""
    model.tokenratio_origin = origin  # type: ignore[assignment]  # torch expects a tensor


def absolute(name: str | Path) -> str:
    """The absolute path of a folder, a GGUF file or a packaged model; any other name unchanged."""
    if is_package(name):
        return str(packaged_model(str(name)))
    path = Path(name).expanduser()
    is_local = os.path.isdir(path) or (is_gguf(name) and os.path.isfile(path))
    return os.path.abspath(path) if str(name) and is_local else str(name)


def resolved_name(name: str | Path) -> str:
    """An absolute path (`absolute`), or a hub name; refuses a path that does not exist."""
    name = absolute(name)
    if is_gguf(name) and not os.path.isfile(name):
        raise TokenRatioError(f"cannot load {name}: there is no such file")
    if not is_gguf(name) and not os.path.isdir(name) and _is_path(name):
        raise TokenRatioError(f"cannot load {name}: there is no such folder")
    return name


def described(name: str) -> str:
    """A base's name as people read it: a GGUF file's with its quantisation, a package's."""
    if is_gguf(name) and os.path.isfile(name):
        return f"{name} ({quantisation(name) or 'GGUF'})"
    package = package_of(name)
    return name if package is None else str(package)


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter on disk or on the hub.

    Attributes:
        name: its absolute folder or hub name.
        where: arguments of from_pretrained about where to find its files.
        base: the model it was trained on: an absolute folder or hub name.
        base_where: as `where`, for the base's files.
    """

    name: str
    where: Mapping[str, Any]
    base: str
    base_where: Mapping[str, Any]


def saved_adapter(name: str | Path, where: Mapping[str, Any]) -> SavedAdapter | None:
    """The adapter in a folder or hub repository; None if there is none, or also a whole model.

    Args:
        where: arguments of from_pretrained; those not about where to look are ignored.
    Raises:
        TokenRatioError: `name` can only be a folder but does not exist, the adapter lacks a file,
            or its base cannot be found.
    """
    where = {key: value for key, value in where.items() if key in WHERE_KWARGS}
    name = resolved_name(name)
    if is_gguf(name):
        return None
    is_local = os.path.isdir(name)
    try:
        file = find_adapter_config_file(name, **where)
    except (OSError, ValueError):  # loading the model reports what is wrong with the name
        return None
    if file is None:
        return None
    config = read_record(dict[str, Any], file)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    folder = Path(file).parent
    if is_local and (folder / "config.json").is_file() and _has_any(folder, MODEL_WEIGHTS):
        return None
    if is_local and not _has_any(folder, _ADAPTER_WEIGHTS):
        raise TokenRatioError(f"{folder} has {ADAPTER_FILE} but no {_ADAPTER_WEIGHTS[0]}")
    if not isinstance(base, str) or not base:
        raise TokenRatioError(
            f"{name} is an adapter and does not name its base model: set base_model_name_or_path "
            f"in its {ADAPTER_FILE}"
        )
    base_where = {key: value for key, value in where.items() if key not in _OF_ONE_REPOSITORY}
    if isinstance(revision, str):
        base_where["revision"] = revision
    return SavedAdapter(
        name, where, _find_base(name, folder if is_local else None, base), base_where
    )


def chain_of(
    name: str | Path, where: Mapping[str, Any] | None = None
) -> tuple[str, Mapping[str, Any], tuple[SavedAdapter, ...]]:
    """The model at the bottom of `name`, where it is found, and the adapters on it in order."""
    base = absolute(name)
    where = {key: value for key, value in (where or {}).items() if key in WHERE_KWARGS}
    chain: list[SavedAdapter] = []
    while (adapter := saved_adapter(base, where)) is not None:
        if any(adapter.name == other.name for other in chain):
            raise TokenRatioError(f"{adapter.name}: the adapter names itself as its base")
        chain.insert(0, adapter)
        base, where = adapter.base, adapter.base_where
    return base, where, tuple(chain)


def relocated(path: str, folder: Path) -> Path | None:
    """Where `path` is now if a run was moved together with what it used.

    Args:
        path: absolute, as `run.json` or an adapter names it.
        folder: the run's folder now, or a checkpoint in it.
    """
    for place, record in _records(folder):
        was = record.get("run_folder")
        if isinstance(was, str):
            return Path(os.path.normpath(place / os.path.relpath(path, was)))
    return None


def _find_base(name: str, folder: Path | None, base: str) -> str:
    """The base that the adapter `name` in `folder` (None: on the hub) was trained on, resolved.

    A relative path is searched in the run's working directory, in the folders above the adapter,
    the nearest first, and in the current directory.
    """
    given = Path(base).expanduser()
    made_in = None if folder is None else _made_in(folder)
    if given.is_absolute():
        moved = None if folder is None else relocated(str(given), folder)
        places = [given, moved]
    else:
        above = [] if folder is None else [folder, *folder.parents]
        places = [at and at / given for at in (made_in, *above, Path.cwd())]
    for place in filter(None, places):
        if any(os.path.isfile(place / file) for file in ("config.json", ADAPTER_FILE)):
            return os.path.abspath(place)
        if is_gguf(place) and os.path.isfile(place):
            return os.path.abspath(place)
    if (package := package_of(given)) is not None:  # in the cache of another machine
        return str(packaged_model(package.name))
    is_folder = len(given.parts) > 1 and given.parts[0].lower() in _FOLDER_NAMES
    if is_folder or _is_path(base) or any(map(_CHECKPOINT.fullmatch, given.parts)):
        was = "" if given.is_absolute() or made_in is None else f"; it was in {made_in}"
        raise TokenRatioError(
            f"the adapter {name} was trained on {base}, which was not found{was}. Put that model "
            f"there, or set base_model_name_or_path in {ADAPTER_FILE} to where it is"
        )
    return base


def _made_in(folder: Path) -> Path | None:
    """The working directory of the run that wrote `folder`, if its output_dir was relative."""
    for place, record in _records(folder):
        config = record.get("config")
        given = config.get("output_dir") if isinstance(config, Mapping) else None
        if isinstance(given, str) and not os.path.isabs(given):
            parts = Path(os.path.normpath(given)).parts
            if place.parts[len(place.parts) - len(parts) :] == parts:
                return Path(*place.parts[: len(place.parts) - len(parts)])
    return None


def _records(folder: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """The run's folder and `run.json`, from that folder or a checkpoint in it."""
    folder = Path(os.path.abspath(folder))
    for place in (folder, folder.parent):
        record = read_document(place / RUN_FILE)
        if record is not None:
            yield place.parent if _CHECKPOINT.fullmatch(place.name) else place, record
            return


def _is_path(name: str) -> bool:
    """Whether a name can only be a folder's, because it is not valid for a hub repository."""
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        return True
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return False


def _has_any(folder: Path, patterns: Iterable[str]) -> bool:
    return any(any(folder.glob(pattern)) for pattern in patterns)
