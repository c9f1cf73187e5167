"""What a case is: how a batch is made, and the loss that is differentiated."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One training step without its optimizer.

    Attributes:
        collate: encoded pairs to what `loss` takes, on the CPU; not timed, a data loader's work.
        loss: the batch's mean loss over pairs, a scalar to call `backward` on; timed.
    """

    collate: Callable[[list[dict]], Any]
    loss: Callable[[Any], Tensor]


class UnavailableError(Exception):
    """This case cannot run here; the message says why. Reported, never passed over."""
