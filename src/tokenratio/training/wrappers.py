"""What accelerate is asked to wrap the policy in, and whether that will do what it says."""

import importlib.util
import logging
import os
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import TrainingArguments
from transformers.utils.generic import strtobool

from tokenratio.errors import TokenRatioError
from tokenratio.models.heartbeat import watch_processes
from tokenratio.settings import as_bool

_log = logging.getLogger(__name__)
_RAM = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def prepare_processes(args: TrainingArguments) -> None:
    """Before transformers connects the processes: what it leaves out.

    Raises:
        TokenRatioError: DeepSpeed is asked for but not installed.
    """
    if asks_for_deepspeed(args) and importlib.util.find_spec("deepspeed") is None:
        raise TokenRatioError(
            "DeepSpeed is asked for (by the deepspeed setting, or by `accelerate config`) but is "
            "not installed: pip install 'tokenratio[deepspeed]'"
        )
    is_asked = as_bool(args.fsdp)
    if is_asked is not None:  # recipes and flags give text, which transformers takes for a strategy
        args.fsdp = cast(Any, is_asked)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if several and (args.use_cpu or strtobool(os.environ.get("ACCELERATE_USE_CPU", "false"))):
        # transformers gives ddp_timeout to processes on GPUs only.
        timeout = timedelta(seconds=args.ddp_timeout)
        PartialState(cpu=True, backend=args.ddp_backend, timeout=timeout)


def settle_wrapper(args: TrainingArguments) -> None:
    """Refuse wrappers that are not supported, and have every process load whole models.

    Raises:
        TokenRatioError: FSDP's first version.
    """
    if args.world_size > 1 and dist.is_initialized():
        watch_processes(args.ddp_timeout, "Resume the run from its newest checkpoint")
    if asks_for_deepspeed(args):
        from tokenratio.training.sharding import load_whole_models

        load_whole_models()
    if not asks_for_fsdp(args):
        return
    config = args.fsdp_config if args.fsdp and isinstance(args.fsdp_config, dict) else None
    version: Any
    loads_once: Any
    if config is None:
        version, loads_once = os.environ.get("FSDP_VERSION", "1"), os.environ.get(_RAM, "false")
    else:
        version, loads_once = config.get("version", 2), config.get("cpu_ram_efficient_loading")
    if str(version) != "2":
        raise TokenRatioError(
            f"FSDP version {version} is not supported: set fsdp_version: 2 in accelerate's "
            "configuration (version: 2 in fsdp_config)"
        )
    if strtobool(str(loads_once or "false")):
        _log.warning(
            "cpu_ram_efficient_loading is turned off: every process loads the whole model to check "
            "it, and needs the memory for it on the CPU until the model is sharded"
        )
        os.environ[_RAM] = "false"
        if config is not None:
            config["cpu_ram_efficient_loading"] = False
            args.fsdp_plugin_args["cpu_ram_efficient_loading"] = False


def check_wrapper(args: TrainingArguments) -> None:
    """Refuse a wrapper that accelerate would ignore silently.

    Raises:
        TokenRatioError: FSDP or DeepSpeed on a CPU, or on one process.
    """
    kind = args.distributed_state.distributed_type
    for name, is_asked, kinds in (
        ("FSDP", asks_for_fsdp(args), (DistributedType.NO, DistributedType.MULTI_CPU)),
        ("DeepSpeed", asks_for_deepspeed(args), (DistributedType.NO, DistributedType.MULTI_CPU)),
    ):
        if is_asked and kind in kinds:
            where = "on a CPU" if kind == DistributedType.MULTI_CPU else "in one process"
            instead = "train with plain DDP" if args.world_size > 1 else "ignore it"
            raise TokenRatioError(
                f"{name} is asked for, but this run is {where}, where accelerate would {instead}: "
                f"start one process for each GPU with `accelerate launch`, or leave {name} out"
            )


def asks_for_fsdp(args: TrainingArguments) -> bool:
    """Whether the settings or accelerate's launcher ask for FSDP."""
    return bool(args.fsdp) or strtobool(os.environ.get("ACCELERATE_USE_FSDP", "false")) == 1


def asks_for_deepspeed(args: TrainingArguments) -> bool:
    """Whether the settings or accelerate's launcher ask for DeepSpeed."""
    asked = strtobool(os.environ.get("ACCELERATE_USE_DEEPSPEED", "false")) == 1
    return bool(args.deepspeed) or asked
