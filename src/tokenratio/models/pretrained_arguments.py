"""The arguments that `from_pretrained` is given for a model named by the user."""

from collections.abc import Mapping
from typing import Any

import torch

from tokenratio.errors import TokenRatioError

# Arguments of from_pretrained about where to find files, not how to build the model.
WHERE_KWARGS = ("revision", "token", "cache_dir", "subfolder", "local_files_only")
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}


def read_init_kwargs(init_kwargs: Any, where: str = "model_init_kwargs") -> dict[str, Any] | None:
    """The same arguments, with one name and one spelling for each dtype.

    `torch_dtype`, the older name, means `dtype`; either may be text or a torch.dtype.

    Args:
        where: the setting they come from, for messages.
    Raises:
        TokenRatioError: not a mapping; two dtypes that differ; one that torch does not have; an
            argument that has another place.
    """
    if init_kwargs is None:
        return None
    if not isinstance(init_kwargs, Mapping):
        raise TokenRatioError(f"{where} must hold `name: value` lines, not {init_kwargs!r}")
    if "output_loading_info" in init_kwargs:
        raise TokenRatioError(f"{where} cannot have output_loading_info")
    if "gguf_file" in init_kwargs:
        raise TokenRatioError(
            f"{where} cannot have gguf_file: name the file itself as the model, such as "
            f"path/to/{init_kwargs['gguf_file']}"
        )
    read = dict(init_kwargs)
    dtypes = {name: read.pop(name, None) for name in ("dtype", "torch_dtype")}
    given = [_dtype_name(v, f"{k} in {where}") for k, v in dtypes.items() if v is not None]
    if len(set(given)) > 1:
        raise TokenRatioError(
            f"{where} has dtype {given[0]} and torch_dtype {given[1]}: remove one of them"
        )
    return {**read, "dtype": given[0]} if given else read


def loading_arguments(init_kwargs: Any, where: str = "model_init_kwargs") -> dict[str, Any]:
    """Arguments of `from_pretrained`: those given, and float32 unless they name a dtype."""
    return {"dtype": "float32", **(read_init_kwargs(init_kwargs, where) or {})}


def _dtype_name(value: Any, where: str) -> str:
    if value == "auto":
        return "auto"
    name = str(value).removeprefix("torch.")
    name = _SHORT.get(name, name)
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TokenRatioError(f"{where} must be float32, bfloat16, float16 or auto, not {value}")
    return str(dtype).removeprefix("torch.")
