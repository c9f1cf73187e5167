"""Whether a model is still the one that its folder or hub name holds."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn

from tokenratio.models.reference import own_weights
from tokenratio.models.token_requests import language_model


def changed_weight(model: nn.Module, name: str, *, cache_dir: str | None = None) -> str | None:
    """The first weight of a model that is not as `name` holds it; None if none is known to be.

    A model may have been changed since it was loaded: an adapter was merged into it, it was
    trained, or given more tokens. An adapter's own weights do not count. A weight that the files
    have under another name, or only as a quantiser wrote it, is not compared. Pickled files are not
    read.

    Args:
        name: a folder or hub name; of the latter only what has been downloaded is read.
        cache_dir: where downloads are kept, if not in the usual place.
    """
    inner = language_model(model)
    if getattr(inner, "hf_quantizer", None) is not None:
        return None
    folder = _folder_of(name, getattr(inner.config, "_commit_hash", None), cache_dir)
    if folder is None:
        return None
    prefix = f"{inner.base_model_prefix}."
    with ExitStack() as files:
        stored: dict[str, Any] = {}
        for path in sorted(folder.glob("model*.safetensors")):
            stored.update(_tensors(path, files))
        for key, tensor in own_weights(model):
            read = stored.get(key, stored.get(key.removeprefix(prefix)))
            if read is None or tensor.is_meta:
                continue
            kept = read()
            if kept.shape != tensor.shape or not torch.equal(
                kept.to(tensor.dtype), tensor.detach().cpu()
            ):
                return key
    return None


def _folder_of(name: str, revision: str | None, cache_dir: str | None) -> Path | None:
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(
            snapshot_download(name, revision=revision, cache_dir=cache_dir, local_files_only=True)
        )
    except (OSError, ValueError):  # not downloaded, or no name of a repository
        return None


def _tensors(path: Path, files: ExitStack) -> Iterator[tuple[str, Any]]:
    """Each weight's name and a function that reads it."""
    file = files.enter_context(safe_open(path, framework="pt"))
    for key in file.keys():  # noqa: SIM118 (not a mapping)
        yield key, lambda key=key: file.get_tensor(key)
