"""Seconds and peak memory of one step, in a process of its own.

Memory on the CPU is the resident set: its high-water mark is reset once the weights are loaded and
a tiny step has paged in the libraries, so neither the model's construction nor code pages count.
Gradients count. `MALLOC_SETTINGS` make the reading mean what it says: by default glibc raises the
size from which it maps memory of its own for each tensor up to 32 MiB, as tensors are freed; what
is smaller then stays resident after its release, in an amount that depends on history. With a fixed
threshold every tensor of 128 KiB or more is given back when it is freed, and the mark is that of
live tensors. Times are taken after the memory, with glibc's settled defaults (see `settle_malloc`),
because mapping each tensor separately costs page faults. This applies to all cases.
"""

import ctypes
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from models import Models
from step_case import Step

MALLOC_SETTINGS = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class Reading:
    """What one process measured; means are over the batches.

    Attributes:
        seconds: mean of one step: both forward passes, loss, backward.
        head_share: the share of it outside the two transformer bodies: head and loss.
        peak_bytes: a batch's highest memory over the loaded models', gradients included; mean.
        loss: mean loss, to be compared.
    """

    seconds: float
    head_share: float
    peak_bytes: int
    loss: float


def measure(step: Step, models: Models, batches: list[list[dict]], *, repeats: int) -> Reading:
    """Every batch once for memory and warmth, then `repeats` times against the clock."""
    device = next(models.policy.parameters()).device
    cuda = device.type == "cuda"
    collated = [_to(step.collate(rows), device) for rows in batches]
    tiny = _to(step.collate([_shortened(row) for row in batches[0][:2]]), device)
    _run(step, models, tiny)
    _release(models)
    losses, peaks = [], []
    for batch in collated:
        _release(models)
        baseline = start_memory(cuda)
        losses.append(_run(step, models, batch))
        peaks.append(peak_memory(cuda) - baseline)
    if not cuda:
        settle_malloc()
        _run(step, models, collated[0])
    seconds, head = [], []
    with _body_clock(models) as clock:
        for _ in range(repeats):
            for batch in collated:
                _release(models)
                clock.reset()
                begin = clock.now()
                value = step.loss(batch)
                value.backward()
                end = clock.now()
                seconds.append(end - begin)
                head.append(seconds[-1] - clock.forward - (end - clock.backward_begin))
    return Reading(fmean(seconds), sum(head) / sum(seconds), round(fmean(peaks)), fmean(losses))


def settle_malloc() -> None:
    """What glibc's own adjustment arrives at after freeing one tensor of 32 MiB."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
    libc.mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)


def product_seconds(rows: int, hidden: int, vocabulary: int, device: str, dtype: Any) -> float:
    """The fastest of ten products `[rows, hidden] @ [hidden, vocabulary]`: a head's limit."""
    left = torch.randn(rows, hidden, device=device, dtype=dtype)
    right = torch.randn(vocabulary, hidden, device=device, dtype=dtype)
    out = torch.empty(rows, vocabulary, device=device, dtype=dtype)
    seconds = []
    for _ in range(11):
        begin = now(device)
        torch.mm(left, right.T, out=out)
        seconds.append(now(device) - begin)
    return min(seconds[1:])


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class _Clock:
    """When the bodies run: their forward passes, and where the policy's backward pass begins."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.reset()

    def now(self) -> float:
        return now(self._device)

    def reset(self) -> None:
        self.forward, self.backward_begin, self._begin = 0.0, float("inf"), 0.0

    def enter(self, *_: Any) -> None:
        self._begin = self.now()

    def leave(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.forward += self.now() - self._begin
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.register_hook(self._backward)

    def _backward(self, _gradient: Tensor) -> None:
        # A body that ran twice (prompt, then responses) begins its backward pass once.
        self.backward_begin = min(self.backward_begin, self.now())


@contextmanager
def _body_clock(models: Models) -> Iterator[_Clock]:
    clock = _Clock(next(models.policy.parameters()).device.type)
    handles = []
    for body in (models.inner.base_model, models.reference.base_model):
        handles.append(body.register_forward_pre_hook(clock.enter))
        handles.append(body.register_forward_hook(clock.leave))
    yield clock
    for handle in handles:
        handle.remove()


def _run(step: Step, models: Models, batch: Any) -> float:
    _release(models)
    value = step.loss(batch)
    value.backward()
    return value.item()


def _release(models: Models) -> None:
    models.policy.zero_grad(set_to_none=True)


def _shortened(row: dict) -> dict:
    return {key: value[:4] if isinstance(value, list) else value for key, value in row.items()}


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, dict) or hasattr(batch, "items"):
        return {key: _to(value, device) for key, value in batch.items()}
    return batch.to(device) if hasattr(batch, "to") else batch


def start_memory(cuda: bool) -> int:
    """The bytes in use; what `peak_memory` reports begins here."""
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    return _status("VmRSS")


def peak_memory(cuda: bool) -> int:
    return torch.cuda.max_memory_allocated() if cuda else _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
