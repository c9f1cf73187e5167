"""The arguments that `from_pretrained` is given for a model named by the user."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import torch

from tokenratio.errors import TokenRatioError, reported_as
from tokenratio.masking import shown_value

# Arguments of from_pretrained about where to find files, not how to build the model.
WHERE_KWARGS = ("revision", "token", "cache_dir", "subfolder", "local_files_only")
# A model is data alone: its files are never run or unpickled. Without the first, transformers asks
# on standard input whether to run them.
DATA_ALONE: Mapping[str, Any] = {"trust_remote_code": False}
_SAFE = {**DATA_ALONE, "weights_only": True}
_ONLY_DATA = {**_SAFE, "allow_all_kernels": False}
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}


def read_init_kwargs(init_kwargs: Any, where: str = "model_init_kwargs") -> dict[str, Any] | None:
    """The same arguments, with one name and one spelling for each dtype.

    `torch_dtype`, the older name, means `dtype`; either may be text or a torch.dtype.

    Args:
        where: the setting they come from, for messages.
    Raises:
        TokenRatioError: not a mapping; two dtypes that differ; one that torch does not have; an
            argument that has another place, or that lets a model run code.
    """
    if init_kwargs is None:
        return None
    if not isinstance(init_kwargs, Mapping):
        raise TokenRatioError(
            f"{where} must hold `name: value` lines, not {shown_value(where, init_kwargs)}"
        )
    if "output_loading_info" in init_kwargs:
        raise TokenRatioError(f"{where} cannot have output_loading_info")
    if "gguf_file" in init_kwargs:
        raise TokenRatioError(
            f"{where} cannot have gguf_file: name the file itself as the model, such as "
            f"path/to/{init_kwargs['gguf_file']}"
        )
    for name, value in _ONLY_DATA.items():
        if init_kwargs.get(name, value) not in (value, None):
            raise TokenRatioError(
                f"{name} in {where} must stay {str(value).lower()}: a model must contain only "
                "data, and tokenratio never runs code that comes with one"
            )
    read = {name: value for name, value in init_kwargs.items() if name not in _ONLY_DATA}
    dtypes = {name: read.pop(name, None) for name in ("dtype", "torch_dtype")}
    given = [_dtype_name(v, f"{k} in {where}") for k, v in dtypes.items() if v is not None]
    if len(set(given)) > 1:
        raise TokenRatioError(
            f"{where} has dtype {given[0]} and torch_dtype {given[1]}: remove one of them"
        )
    return {**read, "dtype": given[0]} if given else read


def loading_arguments(init_kwargs: Any, where: str = "model_init_kwargs") -> dict[str, Any]:
    """Arguments of `from_pretrained`: those given, and float32 unless they name a dtype.

    They let no model run code.
    """
    given = read_init_kwargs(init_kwargs, where) or {}
    return {"dtype": "float32", **given, **_SAFE}


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn any error of `from_pretrained` into a line; a model that needs code of its own is named.

    Raises:
        TokenRatioError: "cannot load" and what, with the reason.
    """
    with reported_as(f"cannot load {what}"), warnings.catch_warnings():
        # torch's, about a file that it then refuses.
        warnings.filterwarnings("ignore", "Detected pickle protocol")
        try:
            yield
        except Exception as error:
            if "trust_remote_code" in str(error):
                raise TokenRatioError(
                    f"cannot load {what}: it needs Python code that comes with it (auto_map in "
                    "its configuration), and tokenratio never runs such code: a model must "
                    "contain only data. Use a model whose architecture transformers supports"
                ) from None
            if isinstance(error, UnpicklingError):
                raise TokenRatioError(
                    f"cannot load {what}: its pickled weights are damaged, or hold more than "
                    "tensors, which could run code. Use its safetensors files"
                ) from None
            raise


def _dtype_name(value: Any, where: str) -> str:
    if value == "auto":
        return "auto"
    name = str(value).removeprefix("torch.")
    name = _SHORT.get(name, name)
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TokenRatioError(f"{where} must be float32, bfloat16, float16 or auto, not {value}")
    return str(dtype).removeprefix("torch.")
