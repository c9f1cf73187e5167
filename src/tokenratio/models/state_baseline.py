"""TBPO-Q's state baseline: a small head that learns log Z(s) (docs/method.md §4)."""

import json
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenratio.errors import TokenRatioError, reported_as

BASELINE_FILE = "state_baseline.safetensors"
OPTIMIZER_FILE = "state_baseline_optimizer.safetensors"
_STATE = ("step", "exp_avg", "exp_avg_sq")  # of AdamW


class StateBaseline(nn.Module):
    """b(s): a scalar from the hidden state, through one hidden layer with GELU, in float32.

    See docs/method.md §4. The hidden state is detached: no gradient of b enters the backbone. The
    last layer starts at zero (our choice; the paper does not say), so training starts from w = 1,
    uncorrected TBPO. It has no bias: a constant in b cancels in every log w_t, so its gradient
    would be rounding noise, which AdamW would turn into full-size steps.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        # In this order: each layer draws its first weights from the run's random numbers.
        first, last = nn.Linear(input_size, hidden_size), nn.Linear(hidden_size, 1, bias=False)
        self.layers = nn.Sequential(first, nn.GELU(), last)
        nn.init.zeros_(last.weight)

    def forward(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens"]:
        with torch.autocast(hidden.device.type, enabled=False):
            dtype = next(self.layers.parameters()).dtype
            return self.layers(hidden.detach().to(dtype)).squeeze(-1)


def save_baseline(baseline: StateBaseline, folder: Path) -> None:
    """Write the weights as safetensors, with the sizes needed to rebuild the head."""
    first = baseline.layers[0]
    sizes = {"input_size": str(first.in_features), "hidden_size": str(first.out_features)}
    save_file(_contiguous(baseline.state_dict()), folder / BASELINE_FILE, metadata=sizes)


def load_baseline(baseline: StateBaseline, folder: Path) -> None:
    """Restore what `save_baseline` wrote; refuses a head of another size."""
    path = folder / BASELINE_FILE
    if not path.is_file():
        raise TokenRatioError(f"{folder} has no {BASELINE_FILE}: it is not from a tbpo_q run")
    tensors = _read_tensors(path)
    sizes = {name: tensor.shape for name, tensor in baseline.state_dict().items()}
    if sizes != {name: tensor.shape for name, tensor in tensors.items()}:
        raise TokenRatioError(
            f"{path} was trained with another baseline_hidden_size or another model size"
        )
    baseline.load_state_dict(tensors)


def read_baseline(folder: Path) -> StateBaseline | None:
    """The head saved by a finished run; None if there is none."""
    path = folder / BASELINE_FILE
    if not path.is_file():
        return None
    # From the weights, which are there: metadata could ask for any size.
    weight = _read_tensors(path).get("layers.0.weight", torch.empty(0))
    if weight.ndim != 2:
        raise TokenRatioError(f"{path} is not a state baseline: it has no layers.0.weight")
    baseline = StateBaseline(weight.shape[1], weight.shape[0])
    load_baseline(baseline, folder)
    return baseline.eval()


def save_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Write an optimizer's state as safetensors: tensors by `index.name`, groups as metadata."""
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": value
        for index, values in state["state"].items()
        for name, value in values.items()
    }
    save_file(
        _contiguous(tensors), path, metadata={"param_groups": json.dumps(state["param_groups"])}
    )


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Restore what `save_optimizer` wrote, except the learning rate and other settings."""
    if not path.is_file():
        raise TokenRatioError(f"{path} is missing: the checkpoint cannot be resumed exactly")
    state: dict[int, dict[str, Tensor]] = {}
    groups = optimizer.state_dict()["param_groups"]
    parameters = (each for group in optimizer.param_groups for each in group["params"])
    expected = {
        f"{index}.{name}": () if name == "step" else tuple(each.shape)
        for index, each in enumerate(parameters)
        for name in _STATE
    }
    found = _read_tensors(path)
    if found and expected != {key: tuple(value.shape) for key, value in found.items()}:
        raise TokenRatioError(f"{path} is of another optimizer, or of a baseline of another size")
    for key, value in found.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with reported_as(f"{path} is cut off or damaged"):
        return load_file(path)


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
