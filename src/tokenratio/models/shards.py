"""Parameters of which each process holds a part: FSDP2's and ZeRO-3's."""

from typing import Any, cast

from torch import Tensor
from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only, as it does between calls."""
    status: Any = getattr(tensor, "ds_status", None)
    return isinstance(tensor, DTensor) or (status is not None and status.name != "AVAILABLE")


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, as a constant where it has to be gathered: all processes must call it."""
    if not is_sharded(tensor):
        return tensor
    if isinstance(tensor, DTensor):
        detached: Any = tensor.detach()
        return cast(Tensor, detached.full_tensor())
    import deepspeed  # an optional package

    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().clone()
