"""The device and the precision that are taken by default, and what is said about them."""

import pytest
import torch

from tokenratio.models import device
from tokenratio.models.device import (
    describe_device,
    describe_sampling,
    describe_training,
    sampling_dtype,
)
from tokenratio.statistics.head import multiplies_bfloat16

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NO_GPU = "cpu (no GPU found)"


@pytest.fixture
def machine(monkeypatch):
    """Make torch describe a machine: its default device, and what that device multiplies."""

    def make(default="cpu", **features):
        is_fast = bool(features.pop("gpu_bfloat16", False))
        monkeypatch.setattr(device, "default_device", lambda: torch.device(default))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True: is_fast or including_emulation,
        )
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)

    return make


@pytest.mark.parametrize(
    ("default", "features", "expected"),
    [
        ("cpu", {"avx512_f": True}, False),
        ("cpu", {"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ("cpu", {"avx512_bf16": True}, True),
        ("cpu", {"amx_bf16": True}, True),
        ("cpu", {"neon": True, "bf16": True}, True),
        ("cuda", {"gpu_bfloat16": True}, True),
        ("cuda", {"avx512_bf16": True}, False),  # an older GPU emulates it
        ("mps", {"avx512_bf16": True}, False),
    ],
)
def test_auto_is_bfloat16_only_where_the_hardware_multiplies_it(
    default, features, expected, machine, monkeypatch
):
    machine(default, **features)
    assert multiplies_bfloat16(torch.device(default)) is expected
    assert sampling_dtype("auto") == ("bfloat16" if expected else "float32")
    for asked in ("float32", "bfloat16", "float16"):
        assert sampling_dtype(asked) == describe_sampling(asked) == asked
    if default == "cpu":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert not multiplies_bfloat16(CPU)


def test_a_torch_that_cannot_be_asked_multiplies_in_float32(machine, monkeypatch):
    machine(avx512_bf16=True)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert sampling_dtype("auto") == "float32"


def test_the_line_says_which_and_why(machine):
    machine()
    assert describe_device() == NO_GPU
    assert describe_sampling("auto") == (
        "float32 (dtype: auto; this CPU does not multiply bfloat16 in hardware)"
    )
    assert describe_training(CPU, torch.float32, None) == f"{NO_GPU}; weights in float32"
    assert describe_training(CPU, torch.float32, torch.bfloat16) == (
        f"{NO_GPU}; weights in float32, products in bfloat16 "
        "(bf16: true; this CPU does not do this in hardware)"
    )
    machine(avx512_bf16=True)
    assert describe_sampling("auto") == (
        "bfloat16 (dtype: auto; this CPU multiplies it faster than float32)"
    )
    assert describe_training(CPU, torch.float32, torch.bfloat16) == (
        f"{NO_GPU}; weights in float32, products in bfloat16 (bf16: true; faster on this CPU)"
    )
    assert describe_training(CPU, torch.float32, None) == (
        f"{NO_GPU}; weights in float32 "
        "(bf16: true would multiply in bfloat16, which is faster on this CPU)"
    )
    assert describe_training(CPU, torch.bfloat16, None) == f"{NO_GPU}; weights in bfloat16"
    machine("cuda", gpu_bfloat16=True)
    assert describe_device() == "cuda (NVIDIA H100)"
    assert describe_device(CPU) == "cpu (use_cpu is true)"
    assert describe_training(CUDA, torch.bfloat16, torch.float16) == (
        "cuda (NVIDIA H100); weights in bfloat16, products in float16 (fp16: true)"
    )
