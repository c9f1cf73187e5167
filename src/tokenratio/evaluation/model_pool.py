"""The models of an evaluation, each loaded once and shared by everything that runs it."""

from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel

from tokenratio.models.device import default_device, default_dtype
from tokenratio.models.loading import load_model


class ModelPool:
    """Loads policies by hub name or folder and holds them for as long as they are needed.

    Args:
        kept: models that are needed throughout. Of all others only the one asked for last is held.
        dtype: of the weights; `auto` is bfloat16 where the hardware multiplies it faster, else
            float32.
    """

    def __init__(self, kept: Iterable[str] = (), *, dtype: str = "auto") -> None:
        self._dtype = default_dtype() if dtype == "auto" else dtype
        self._kept = {_key(path) for path in kept}
        self._models: dict[str, PreTrainedModel] = {}

    def model(self, path: str) -> PreTrainedModel:
        """The model, on the default device.

        Raises:
            TokenRatioError: it cannot be loaded.
        """
        key = _key(path)
        if key not in self._models:
            for other in self._models.keys() - self._kept:
                del self._models[other]
            self._models[key] = load_model(path, {"dtype": self._dtype})
            self._models[key].to(default_device())  # type: ignore[arg-type]  # a wrapped method
        return self._models[key]


def _key(path: str) -> str:
    """One name for one model, however its folder is written."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path
