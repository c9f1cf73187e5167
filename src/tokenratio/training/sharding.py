"""Training with FSDP2 or DeepSpeed, which give each process a part of the weights.

accelerate wraps the policy; what is here is what transformers' trainer leaves out: the reference,
precision, the guard against gradients that are not finite, and complete models on disk.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput

from tokenratio.errors import TokenRatioError
from tokenratio.models.heartbeat import naming_lost
from tokenratio.models.shards import whole


class ShardedTrainer(Trainer):
    """A trainer of models whose weights may be sharded over processes."""

    model: nn.Module

    def stop_for_gradient(self) -> NoReturn:
        """Stop the run, because a gradient is not finite."""
        raise NotImplementedError

    @property
    def wrapper(self) -> str:
        """What wraps the policy: `none`, `ddp`, `fsdp2`, `zero1`, `zero2` or `zero3`."""
        state = self.accelerator.state
        if self.is_fsdp_enabled:
            return "fsdp2"
        if self.is_deepspeed_enabled:
            return f"zero{state.deepspeed_plugin.zero_stage}"
        return "none" if state.distributed_type == DistributedType.NO else "ddp"

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        policy = self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.mixed_precision_policy
        if policy:  # as under autocast: losses and the sum of gradients stay float32
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = replace(
                policy, reduce_dtype=torch.float32, output_dtype=None
            )
        if self.is_deepspeed_enabled:
            load_whole_models()
            plugin = self.accelerator.state.deepspeed_plugin
            zero = plugin.deepspeed_config.get("zero_optimization", {})
            if plugin.zero_stage == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
                raise TokenRatioError(
                    "DeepSpeed ZeRO-3 would save no model: set zero3_save_16bit_model in "
                    "accelerate's configuration (stage3_gather_16bit_weights_on_model_save in "
                    "DeepSpeed's) to true"
                )

    def prepare_reference(self, model: PreTrainedModel) -> nn.Module:
        """A frozen model, moved to the device and wrapped like the policy."""
        if self.is_fsdp_enabled:
            return fsdp2_prepare_model(self.accelerator, model)
        if self.is_deepspeed_enabled:
            return _deepspeed_inference(self.accelerator, model)
        model.to(self.args.device)  # type: ignore[arg-type]  # transformers wraps `to` without its types
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    # --- the step ---------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with naming_lost():
            return super().train(*args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_deepspeed_enabled and not self.args.fp16:
            self._guard_engine()
        return prepared

    def _guard_engine(self) -> None:
        """Check gradients before DeepSpeed's update.

        Its engine reduces and frees gradients during the backward pass and updates right after it,
        so each is looked at when it is formed.
        """
        engine: Any = self.deepspeed
        finite = torch.ones((), dtype=torch.bool, device=self.args.device)

        def look(gradient: Tensor) -> None:
            finite.logical_and_(gradient.isfinite().all())

        def checked(step: Any, *args: Any, **kwargs: Any) -> Any:
            are_finite = bool(self.accelerator.reduce(finite.float(), "mean") == 1)
            finite.fill_(True)
            if not are_finite:
                self.stop_for_gradient()
            return step(*args, **kwargs)

        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(look)
        engine.step = partial(checked, engine.step)

    def check_gradient(self) -> None:
        """Before each update: stop the run, weights intact, if a gradient is not finite."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if gradients and not whole(torch.nn.utils.get_total_norm(gradients)).isfinite():
            self.stop_for_gradient()

    def _prepare_input(self, data: Any) -> Any:
        if isinstance(data, Tensor):  # transformers would round to what DeepSpeed computes in
            return data.to(self.args.device)
        return super()._prepare_input(data)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate; a model that was not trained yet is sharded first."""
        if self.is_fsdp_enabled and not isinstance(self.model, FSDPModule):
            self.model = self.model_wrapped = fsdp2_prepare_model(self.accelerator, self.model)
            self.accelerator._models.append(self.model)
        if self.is_deepspeed_enabled and self.deepspeed is None:
            raise TokenRatioError(
                "DeepSpeed prepares a model when training begins: evaluate after train(), or in a "
                "run without DeepSpeed"
            )
        with naming_lost():
            return super().evaluation_loop(*args, **kwargs)

    # --- saving -----------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole model, as transformers or PEFT load it, also in a sharded checkpoint."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        # transformers saves no model where the plugin asks for a sharded state.
        self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if state_dict and isinstance(self.model, PreTrainedModel):
            # Gathered one by one, tied weights are no longer one tensor, and would be saved twice.
            for name, source in (getattr(self.model, "all_tied_weights_keys", None) or {}).items():
                if source in state_dict:
                    state_dict.pop(name, None)
        super()._save(output_dir, state_dict)


def load_whole_models() -> None:
    """Have models loaded from now on come whole, although ZeRO-3 is in use.

    transformers would partition them while loading; what is checked and recorded before training
    needs whole weights, and DeepSpeed partitions them when training begins.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def _deepspeed_inference(accelerator: Accelerator, model: PreTrainedModel) -> nn.Module:
    """The model in an engine of DeepSpeed without an optimizer; sharded under ZeRO-3."""
    import deepspeed

    theirs = accelerator.state.deepspeed_plugin.deepspeed_config
    zero = theirs.get("zero_optimization", {})
    is_sharded = zero.get("stage") == 3
    kept = ("offload_param", "stage3_param_persistence_threshold") if is_sharded else ()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": 3 if is_sharded else 0,
            **{name: zero[name] for name in kept if zero.get(name, "auto") != "auto"},
        },
    }
    if accelerator.mixed_precision in ("bf16", "fp16"):
        config[accelerator.mixed_precision] = {"enabled": True}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine.eval()
