"""How much memory a run will need, before it starts.

`moments` is the formula, of shapes alone; `tokenratio plan` shards what it returns. It counts what
PyTorch keeps for the backward pass of a Llama-like layer; `benchmarks/memory.py` measures it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.training_args import OptimizerNames

from tokenratio.models.pretrained_arguments import DATA_ALONE
from tokenratio.statistics.chunks import default_chunk_size
from tokenratio.training.config import TokenRatioConfig

_OPTIMIZER_STATES = {"rmsprop": 1, "sgd": 0, "adafactor": 0}
_BLOCKS = 4 * 4 * 2**20  # float32 blocks of elementwise work on a CPU (`statistics.chunks`)
# Bytes by what they are for, at one moment of a step.
Parts: TypeAlias = Mapping[str, float]
POLICY, REFERENCE, GRADIENTS = "policy weights", "reference weights", "gradients"
OPTIMIZER, TEMPORARIES = "optimizer state", "temporaries of the optimizer"
ACTIVATIONS, CAST = "activations", "weights in bfloat16"
LOGITS, HEAD_GRADIENT = "logits of one chunk, both models", "gradient buffer of the output head"


@dataclass(frozen=True)
class AdapterShapes:
    """An adapter: its parameters, and the input widths of the matrices it adapts in one layer."""

    parameters: int
    widths: int
    has_dropout: bool = False

    @classmethod
    def of(cls, model: nn.Module, layers: int) -> "AdapterShapes":
        """Of a model with an adapter."""
        named = list(model.named_modules())
        adapted = [m for _, m in named if isinstance(m, BaseTunerLayer)]
        return cls(
            sum(p.numel() for p in model.parameters() if p.requires_grad),
            sum(getattr(module, "in_features", 0) for module in adapted) // layers,
            any("lora_dropout" in name and isinstance(m, nn.Dropout) for name, m in named),
        )


@dataclass(frozen=True)
class Shapes:
    """A model's sizes; `query` is the width of all heads, `parameters` are without the adapter."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    query: int
    vocabulary: int
    is_tied: bool
    adapter: AdapterShapes | None = None

    @classmethod
    def of(cls, config: PretrainedConfig, adapter: AdapterShapes | None = None) -> "Shapes":
        """Of a configuration; nothing is allocated to count the parameters."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **DATA_ALONE)
        text = config.get_text_config()
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            sum(p.numel() for p in model.parameters()),
            text.num_hidden_layers,
            text.hidden_size,
            getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            width * text.num_attention_heads,
            text.vocab_size,
            bool(text.tie_word_embeddings),
            adapter,
        )

    @property
    def head(self) -> int:
        """Parameters of the output head."""
        return self.vocabulary * self.hidden

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        return (self.parameters - self.head * (2 - self.is_tied)) // self.layers

    @property
    def trainable(self) -> int:
        return self.parameters if self.adapter is None else self.adapter.parameters


@dataclass(frozen=True)
class Batch:
    """What one forward and backward pass runs, and how.

    Attributes:
        tokens: of all rows, padding included; `length` of a row; `scored` those of responses.
        weight_bytes: of a weight as it is loaded (an adapter's and gradients are float32).
        stream_bytes: of the residual stream, which has the dtype of the embeddings in use.
        autocast: products are in bfloat16 (or float16).
        checkpointing: each layer is computed again in the backward pass.
        accumulates: earlier batches of the step have left their gradients.
        reference_forward: the reference runs; `reference_copy`: as a model of its own.
        one_pass: the loss is local to its step, so the head runs once (docs/method.md §5).
        optimizer_states: numbers kept for each trained parameter.
    """

    tokens: int
    length: int
    scored: int
    weight_bytes: float = 4
    stream_bytes: int = 4
    autocast: bool = False
    checkpointing: bool = False
    accumulates: bool = False
    reference_forward: bool = True
    reference_copy: bool = True
    one_pass: bool = True
    optimizer_states: int = 1
    device: str = "cpu"

    @property
    def compute_bytes(self) -> int:
        """Of what is multiplied."""
        return 2 if self.autocast else self.stream_bytes


def layer_bytes(shapes: Shapes, batch: Batch) -> int:
    """What a layer keeps of each token for its backward pass.

    RMS norms keep their input in float32, and before trained weights also their normalised input.
    Attention keeps queries, repeated keys and values, its output and a mask; the MLP its gate
    before and after the activation and the other factor. A trained matrix keeps its input; five of
    seven share two inputs unless autocast copies each. A frozen one keeps it for its adapter only.
    """
    h, m = shapes.hidden, shapes.intermediate
    stream, compute = batch.stream_bytes, batch.compute_bytes
    norms, attention, mlp = 2 * 4 * h, compute * (4 * shapes.query + batch.length), compute * 3 * m
    if shapes.adapter is None:
        norms += 2 * stream * h
        inputs = compute * ((5 if compute != stream else 2) * h + m)
    else:
        is_shared = stream == compute == 4 and not shapes.adapter.has_dropout
        widths = shapes.adapter.widths
        width = 2 if batch.autocast else 4  # an adapter is float32
        inputs = width * (min(widths, 2 * h + m) if is_shared else widths)
        # Dropout's mask: one byte on a GPU, on a CPU a factor of the adapter's dtype.
        inputs += widths * shapes.adapter.has_dropout * (4 if batch.device == "cpu" else 1)
    return norms + attention + mlp + inputs


def moments(shapes: Shapes, batch: Batch) -> list[dict[str, float]]:
    """What one process holds at the moments of a step that can be its peak; nothing is sharded.

    They are the end of the forward pass, the last and the first layer of the backward pass, and
    the update. Logits never exist whole.
    """
    full, stream, compute = shapes.adapter is None, batch.stream_bytes, batch.compute_bytes
    h, tokens, models = shapes.hidden, batch.tokens, 1 + batch.reference_forward
    in_layers, gradients = shapes.layer * shapes.layers, 4 * shapes.trainable
    weights = batch.weight_bytes * in_layers
    weights += max(2, batch.weight_bytes) * (shapes.parameters - in_layers)
    always: dict[str, float] = {
        POLICY: weights + (0 if full else gradients),
        REFERENCE: weights * batch.reference_copy,
        OPTIMIZER: gradients * batch.optimizer_states,
    }
    layer = tokens * layer_bytes(shapes, batch)
    last = tokens * h * (4 + stream * (1 + full))  # the last norm, and the states
    kept = last + shapes.layers * (tokens * stream * h if batch.checkpointing else layer)
    # Autocast keeps its copies of trained weights until the forward pass ends; what a frozen matrix
    # was multiplied as is kept with its layer.
    cast = compute * in_layers * (compute < stream)
    cast_in_backward = cast / shapes.layers if batch.checkpointing else cast
    chunk = min(default_chunk_size(shapes.vocabulary, batch.device), batch.scored)
    logits = 4 * models * shapes.vocabulary * chunk
    blocks = min(logits, _BLOCKS) * (batch.device == "cpu")
    # Gradients inside a layer: of the MLP's two factors (that of their product is held instead of
    # the product), and of the stream before and after.
    backward = tokens * (2 * compute * shapes.intermediate + 2 * stream * h)
    # In the first layer all gradients are there but its own and those of untied embeddings.
    missing = 4 * (shapes.layer + shapes.head * (not shapes.is_tied)) * full
    held: dict[str, float] = {
        **always,
        GRADIENTS: gradients * batch.accumulates,
        HEAD_GRADIENT: 4 * shapes.head * full,
    }
    forward_end = {
        **held,
        ACTIVATIONS: kept,
        CAST: cast if full else cast_in_backward,
        LOGITS: logits + blocks,
        "states and copies at the output head": batch.scored * h * (4 + stream * models)
        + _head_copies(shapes, batch, chunk),
    }
    last_layer = {
        **held,
        ACTIVATIONS: kept + backward + layer * batch.checkpointing,
        CAST: cast_in_backward,
    }
    first_layer = {
        **always,
        GRADIENTS: gradients - missing * (not batch.accumulates),
        ACTIVATIONS: layer + backward,
        CAST: cast / shapes.layers,
    }
    # PyTorch updates all parameters of a GPU at once, and needs their size once more.
    temporaries = gradients * (batch.device != "cpu")
    update = {**always, GRADIENTS: gradients, TEMPORARIES: temporaries}
    return [forward_end, last_layer, first_layer, update]


def _head_copies(shapes: Shapes, batch: Batch, chunk: int) -> int:
    """Of the head's weight and of a chunk's logits, in other dtypes (`statistics.products`)."""
    half, logits = 2 * shapes.head, 2 * shapes.vocabulary * chunk
    if batch.device == "cpu":
        return (half + logits) * batch.autocast + 2 * half * (batch.stream_bytes == 2)
    models = (1 + batch.reference_copy) * (batch.stream_bytes == 4)
    return (half * models + 2 * logits) * (batch.compute_bytes == 2)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device at the peak of a step, by what they are for.

    An estimate for choosing a batch size: activations depend on kernels that are not modelled.
    """

    parameters: int
    parts: Parts

    @classmethod
    def at_peak(cls, shapes: Shapes, moments: Iterable[Parts]) -> "MemoryEstimate":
        """Of the moment that needs most."""
        parts = max(moments, key=lambda parts: sum(parts.values()))
        return cls(shapes.parameters, {name: size for name, size in parts.items() if size})

    @property
    def total(self) -> float:
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
    adapter: AdapterShapes | None = None,
    reference_copy: bool = True,
) -> MemoryEstimate:
    """Estimate the peak of a run's training step on one process.

    Args:
        config: the policy's.
        tokens_per_row: longest row of prompt and response.
        adapter: what is trained; None for full fine-tuning.
        reference_copy: the reference is a separate model, not the policy with its adapter off.
    """
    shapes = Shapes.of(config, adapter)
    batch = batch_of(config, args, tokens_per_row, reference_copy=reference_copy)
    return MemoryEstimate.at_peak(shapes, moments(shapes, batch))


def batch_of(
    config: PretrainedConfig, args: TokenRatioConfig, tokens_per_row: int, *, reference_copy: bool
) -> Batch:
    """One batch of a run with these settings."""
    rows = args.per_device_train_batch_size * args.objective.rows_per_example
    width = _dtype_of(config, args).itemsize
    has_reference = args.method.has_reference and not args.keeps_log_probs
    return Batch(
        tokens=rows * tokens_per_row,
        length=tokens_per_row,
        scored=rows * tokens_per_row,
        weight_bytes=width,
        stream_bytes=width,
        autocast=args.autocast_dtype is not None,
        checkpointing=bool(args.activation_checkpointing),
        accumulates=args.gradient_accumulation_steps > 1,
        reference_forward=has_reference,
        reference_copy=has_reference and reference_copy,
        one_pass=args.compares_steps,
        optimizer_states=_OPTIMIZER_STATES.get(OptimizerNames(args.optim).value, 2),
        device=args.device.type,
    )


def _dtype_of(config: PretrainedConfig, args: TokenRatioConfig) -> torch.dtype:
    """The dtype that `loading_arguments` makes of the settings."""
    name = (args.init_kwargs or {}).get("dtype", "float32")
    dtype = config.dtype if name == "auto" else getattr(torch, name)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def format_bytes(size: float) -> str:
    """In MiB or GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
