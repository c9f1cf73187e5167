"""How much memory a run will need, before it starts."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.training_args import OptimizerNames

from tokenratio.models.pretrained_arguments import DATA_ALONE
from tokenratio.statistics.chunks import default_chunk_size
from tokenratio.training.config import TokenRatioConfig

# Floats a transformer layer keeps for its backward pass, per token and unit of hidden size: norms,
# projections and activations of attention and MLP (about 4·h of it in the MLP).
_ACTIVATIONS_PER_LAYER = 24
_CHECKPOINT_PER_LAYER = 2  # if the rest is computed again, one layer at a time
_OPTIMIZER_STATES = {"rmsprop": 1, "sgd": 0, "adafactor": 0}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device, by what they are for.

    An estimate for choosing a batch size: activations depend on kernels that are not modelled.
    """

    parameters: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def brief(self) -> str:
        return f"{self.parameters:,} parameters; estimated memory {format_bytes(self.total)}"

    def __str__(self) -> str:
        lines = [f"{self.brief}:"]
        lines += [f"  {name:44}{format_bytes(size):>12}" for name, size in self.parts.items()]
        return "\n".join(lines)


def estimate_memory(
    config: PretrainedConfig,
    args: TokenRatioConfig,
    *,
    tokens_per_row: int,
    trainable_parameters: int | None = None,
    reference_copy: bool = True,
) -> MemoryEstimate:
    """Estimate the peak of one training step (docs/method.md §5: logits never exist whole).

    Each pair counts as two whole rows, although some tokens are cut or shared.

    Args:
        config: the policy's; nothing is allocated to count its parameters.
        tokens_per_row: longest row of prompt and response.
        trainable_parameters: those of the adapter; None for full fine-tuning.
        reference_copy: the reference is a separate model, not the policy with its adapter off.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **DATA_ALONE)
    parameters = sum(p.numel() for p in model.parameters())
    text = config.get_text_config()
    trainable = parameters if trainable_parameters is None else trainable_parameters
    rows = args.per_device_train_batch_size * args.objective.rows_per_example
    tokens = rows * tokens_per_row
    layers, hidden, vocabulary = text.num_hidden_layers, text.hidden_size, text.vocab_size
    kept = layers * _ACTIVATIONS_PER_LAYER
    if args.activation_checkpointing:
        kept = layers * _CHECKPOINT_PER_LAYER + _ACTIVATIONS_PER_LAYER
    activation_bytes = 2 if args.bf16 or args.fp16 else 4
    has_reference = args.method.has_reference and reference_copy and not args.keeps_log_probs
    chunk = vocabulary * min(default_chunk_size(vocabulary, args.device.type), tokens)
    full_head = trainable_parameters is None
    weights = _dtype_of(config, args).itemsize * parameters  # the adapter's are float32
    optimizer = OptimizerNames(args.optim).value
    parts = {
        "policy weights": weights + (0 if full_head else 4 * trainable),
        "reference weights": weights * has_reference,
        "gradients": 4 * trainable,
        f"optimizer state ({optimizer})": 4 * trainable * _OPTIMIZER_STATES.get(optimizer, 2),
        "activations": activation_bytes * tokens * hidden * kept,
        "logits of one chunk, both models": 2 * 4 * chunk,
        "gradient buffer of the output head": 4 * vocabulary * hidden * full_head,
    }
    return MemoryEstimate(parameters, {name: size for name, size in parts.items() if size})


def _dtype_of(config: PretrainedConfig, args: TokenRatioConfig) -> torch.dtype:
    """The dtype that `loading_arguments` makes of the settings."""
    name = (args.init_kwargs or {}).get("dtype", "float32")
    dtype = config.dtype if name == "auto" else getattr(torch, name)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def format_bytes(size: int) -> str:
    """In MiB or GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
