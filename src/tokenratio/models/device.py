"""Where models run and in what precision by default."""

import torch

from tokenratio.statistics.head import multiplies_bfloat16


def default_device() -> torch.device:
    """The accelerator if one can be used, else the CPU.

    A build of torch for CUDA names its accelerator on a machine without a GPU too, so whether the
    device can be used is checked.
    """
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def fastest_dtype() -> torch.dtype:
    """bfloat16 if `default_device` multiplies it in hardware, else float32."""
    return torch.bfloat16 if multiplies_bfloat16(default_device()) else torch.float32


def sampling_dtype(asked: str) -> str:
    """The precision of a model that samples, by name; `auto` is `fastest_dtype`."""
    return _name(fastest_dtype()) if asked == "auto" else asked


def can_pin_memory() -> bool:
    """Whether pinned host memory speeds up copies to `default_device`; elsewhere torch warns."""
    return default_device().type not in ("cpu", "mps")


def describe_device(device: torch.device | None = None) -> str:
    """The device and why it was taken, as text.

    Args:
        device: where models run; default: `default_device`.
    """
    default = default_device()
    device = device or default
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    if device.type != "cpu":
        return device.type
    return "cpu (no GPU found)" if default.type == "cpu" else "cpu (use_cpu is true)"


def describe_sampling(asked: str) -> str:
    """The precision of a model that samples and why it was taken, as text."""
    if asked != "auto":
        return asked
    unit = _unit(default_device())
    if fastest_dtype() == torch.bfloat16:
        return f"bfloat16 (dtype: auto; {unit} multiplies it faster than float32)"
    return f"float32 (dtype: auto; {unit} does not multiply bfloat16 in hardware)"


def describe_training(
    device: torch.device, weights: torch.dtype, autocast: torch.dtype | None
) -> str:
    """Where a run trains, in what precision and why, as text.

    Args:
        weights: the policy's dtype, or that of an adapter's base.
        autocast: the dtype of mixed precision, None without it.
    """
    unit, is_fast = _unit(device), multiplies_bfloat16(device)
    text = f"{describe_device(device)}; weights in {_name(weights)}"
    if autocast is None:
        if weights == torch.float32 and is_fast:
            text += f" (bf16: true would multiply in bfloat16, which is faster on {unit})"
        return text
    setting = "bf16" if autocast == torch.bfloat16 else "fp16"
    text += f", products in {_name(autocast)} ({setting}: true"
    if autocast == torch.bfloat16:
        text += f"; faster on {unit}" if is_fast else f"; {unit} does not do this in hardware"
    return text + ")"


def _unit(device: torch.device) -> str:
    return "this CPU" if device.type == "cpu" else "this GPU"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
