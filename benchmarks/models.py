"""The models that are stepped: Llama from a config, random weights from a fixed seed."""

import copy
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of a Llama; `intermediate` is about 8/3 of `hidden` unless a real model has another."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    tied: bool = False
    kv_heads: int | None = None
    lora_rank: int | None = None


MODELS = {
    "32k": ModelSpec(512, 6, 8, 1376, 32_000),
    "128k": ModelSpec(256, 4, 4, 688, 128_256, tied=True),
    "smoke": ModelSpec(48, 2, 2, 128, 1_000),
    "smoke-tied": ModelSpec(48, 2, 2, 128, 1_000, tied=True),
    "smoke-lora": ModelSpec(48, 2, 2, 128, 1_000, lora_rank=4),
    # Llama-3-8B's sizes at a quarter of its depth.
    "8b-8-layers": ModelSpec(4096, 8, 32, 14_336, 128_256, kv_heads=8),
    "8b-8-layers-lora": ModelSpec(4096, 8, 32, 14_336, 128_256, kv_heads=8, lora_rank=32),
}


@dataclass(frozen=True)
class Models:
    """What a step is taken on. The reference is a model of its own in every case."""

    policy: nn.Module
    reference: LlamaForCausalLM

    @property
    def inner(self) -> LlamaForCausalLM:
        """The policy inside its adapter, if it has one."""
        return (
            self.policy.get_base_model() if hasattr(self.policy, "get_base_model") else self.policy
        )


def build(spec: ModelSpec, *, device: str, dtype: torch.dtype, seed: int = 0) -> Models:
    """Policy and reference on `device`, the policy a little off the reference.

    The two differ, as they do in training after the first update: where they are equal, every
    log-ratio is 0 and every method's loss the same constant, and no comparison would see a fault.
    """
    config = LlamaConfig(
        hidden_size=spec.hidden,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads or spec.heads,
        intermediate_size=spec.intermediate,
        vocab_size=spec.vocabulary,
        tie_word_embeddings=spec.tied,
        max_position_embeddings=8192,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        # Logits of order one, as trained models have them, not all but uniform.
        initializer_range=spec.hidden**-0.5,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        reference = LlamaForCausalLM(config).to(dtype)
    policy = copy.deepcopy(reference).train()
    reference.eval().requires_grad_(False)
    if spec.lora_rank is not None:
        lora = LoraConfig(
            r=spec.lora_rank, lora_alpha=2 * spec.lora_rank, target_modules="all-linear"
        )
        policy = get_peft_model(policy, lora)
    with torch.no_grad():
        for parameter in policy.parameters():
            # An adapter's second matrix starts at zero and would be the reference exactly.
            if parameter.requires_grad and parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3 * config.initializer_range)
    return Models(policy, reference)


def gradient_bytes(models: Models) -> int:
    """What the gradients of all trained parameters take up: part of every case's peak."""
    return sum(p.numel() * p.element_size() for p in models.policy.parameters() if p.requires_grad)
