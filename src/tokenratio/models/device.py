"""Where models run by default: the only place that asks torch for an accelerator."""

import torch


def default_device() -> torch.device:
    """The accelerator if one can be used, else the CPU.

    A build of torch for CUDA names its accelerator on a machine without a GPU too, so whether the
    device can be used is checked.
    """
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def default_dtype() -> torch.dtype:
    """bfloat16 on a GPU that multiplies it in hardware, and so faster; else float32."""
    if default_device().type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def can_pin_memory() -> bool:
    """Whether pinned host memory speeds up copies to `default_device`; elsewhere torch warns."""
    return default_device().type not in ("cpu", "mps")
