"""`tokenratio plan RECIPE`: memory and time of a run on several GPUs, before they are rented."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tokenratio.cli.command import Command
from tokenratio.errors import TokenRatioError
from tokenratio.settings import option

if TYPE_CHECKING:
    from tokenratio.cli.recipe import ResolvedRecipe
    from tokenratio.training.memory import Batch, MemoryEstimate, Shapes

USAGE = """usage: tokenratio plan RECIPE.yaml [--gpus 8] [--gpu-memory 80] [--flag value ...]

Estimates memory per GPU and time per step for the recipe's model and for Llama shapes of 1B, 8B
and 70B, fully fine-tuned, with LoRA or with QLoRA, under DDP, DeepSpeed ZeRO or FSDP2. Rows have
max_length tokens. Of the model only the configuration is read (docs/scaling.md).
"""
# bfloat16 products of an H100, and how many times longer a whole step takes than its arithmetic at
# that rate: both from benchmarks/results.csv, to which a test holds them.
H100_TFLOPS, STEP_OVER_PRODUCTS = 773, 1.63
_USABLE = 0.9  # of a GPU's memory: the rest is for its context, kernels and fragmentation
_FOUR_BITS = 0.516  # bytes of a weight in NF4, its scales quantised again
_PUBLISHED = {"r": 32, "lora_alpha": 64, "target_modules": "all-linear"}  # docs/method.md §7
# Llama 3.2 1B, 3.1 8B and 70B: hidden, layers, heads, intermediate, whether the head is tied.
_LLAMAS = {
    "Llama 1B": (2048, 16, 32, 8192, True),
    "Llama 8B": (4096, 32, 32, 14_336, False),
    "Llama 70B": (8192, 80, 64, 28_672, False),
}


@dataclass(frozen=True)
class PlanOptions:
    """Settings of `plan`."""

    gpus: int = option(8, "Number of GPUs.")
    gpu_memory: float = option(80.0, "Memory of each, in GiB; nine tenths of it are used.")
    tflops: float = option(
        float(H100_TFLOPS), "Matrix-multiply throughput in TFLOP/s (default: H100)."
    )
    bandwidth: float | None = option(
        None, "GB/s that a GPU can send; if given, communication is added to the time."
    )
    verbose: bool = option(False, "Print the parts of every estimate.")

    def __post_init__(self) -> None:
        for name in ("gpus", "gpu_memory", "tflops", "bandwidth"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise TokenRatioError(f"{name} must be positive, not {value}")


@dataclass(frozen=True)
class Estimate:
    """One way to take a step.

    Attributes:
        split: pairs of a batch, and batches of a step, on each GPU.
        seconds: of a step; `sent` the bytes that a GPU sends in it.
    """

    sharding: str
    split: tuple[int, int]
    checkpointing: bool
    memory: "MemoryEstimate"
    seconds: float
    sent: float
    fits: bool

    @property
    def cell(self) -> str:
        """For the table."""
        needed = f"{self.memory.total / 2**30:,.1f} GiB"
        split = "×".join(map(str, self.split)) + " c" * self.checkpointing
        return f"{needed}, {split}, {self.seconds:.3g} s" if self.fits else f"no: needs {needed}"

    def __str__(self) -> str:
        return (
            f"{self.sharding}{'' if self.fits else ' (does not fit)'}: "
            f"per_device_train_batch_size {self.split[0]}, "
            f"gradient_accumulation_steps {self.split[1]}, "
            f"activation_checkpointing {str(self.checkpointing).lower()}; "
            f"{self.seconds:.3g} s and {self.sent / 1e9:.3g} GB sent a step\n{self.memory}"
        )


def plan(path: str, options: PlanOptions) -> None:
    """Print the table, and the parts of the recipe's own run."""
    from tokenratio.cli.recipe import resolve
    from tokenratio.cli.terminal import quiet_libraries
    from tokenratio.training.planning import SHARDINGS

    resolved = resolve(path, {}, {})
    quiet_libraries()
    args, gpus = resolved.main.args, options.gpus
    pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if pairs % gpus:
        raise TokenRatioError(
            f"{path} has {pairs} pairs per update (per_device_train_batch_size × "
            f"gradient_accumulation_steps), which {gpus} GPUs cannot share evenly: choose a number "
            f"of GPUs that divides {pairs}"
        )
    shardings = SHARDINGS if gpus > 1 else SHARDINGS[:1]
    lines = [("model", "training", *(shardings if gpus > 1 else ("one GPU",)))]
    lines.append(("---",) * len(lines[0]))
    parts = []
    for model, training, is_own, shapes, batch in _cases(resolved):
        found = [
            best(list(estimates(shapes, batch, sharding, pairs // gpus, options)))
            for sharding in shardings
        ]
        lines.append((model, training, *(estimate.cell for estimate in found)))
        # Least communication first: the order of the shardings, unless layers are computed again.
        chosen = min(found, key=lambda one: (not one.fits, one.checkpointing))
        shown = found if options.verbose else [chosen] * is_own
        parts += [f"\n{model}, {training}, {estimate}" for estimate in shown]
    print(
        f"{pairs} pairs per update on {gpus} × {options.gpu_memory:g} GiB, rows of "
        f"{batch.length:,} tokens. Memory of a GPU; per_device_train_batch_size × "
        "gradient_accumulation_steps, c with activation_checkpointing; seconds per step at "
        f"{options.tflops:.4g} TFLOP/s × {STEP_OVER_PRODUCTS}.\n"
    )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print(f"| {' | '.join(cells)} |")
    print(
        "\nQLoRA is shown for comparison only; `train` does not support quantised weights.",
        *parts,
        sep="\n",
    )


def _cases(resolved: "ResolvedRecipe") -> Iterator[tuple[str, str, bool, "Shapes", "Batch"]]:
    """Every model with every way of training, and whether it is the recipe's; a batch of one pair.

    The dtype of frozen weights is the recipe's if it trains an adapter, otherwise bfloat16.
    """
    from transformers import LlamaConfig

    from tokenratio.cli.recipe_models import adapter_shapes, config_of, tokenizer_of
    from tokenratio.cli.train import adapter_of
    from tokenratio.models.loading import load_config
    from tokenratio.training.memory import Shapes, batch_of

    recipe, stage, args = resolved.recipe, resolved.main, resolved.main.args
    if recipe.model is not None:
        own = load_config(recipe.model, args.model_init_kwargs)
    else:
        own = config_of(recipe, tokenizer_of(recipe, args), args)
    configs = {recipe.model or f"this {own.model_type}": own}
    for name, (hidden, layers, heads, intermediate, is_tied) in _LLAMAS.items():
        configs[name] = LlamaConfig(
            vocab_size=128_256,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            intermediate_size=intermediate,
            tie_word_embeddings=is_tied,
        )
    adapter = adapter_of(resolved, stage) if stage.peft is None else stage.peft
    length = args.max_length or own.get_text_config().max_position_embeddings
    given = batch_of(own, args, length, reference_copy=True)
    tokens = length * args.objective.rows_per_example
    given = replace(given, device="cuda", tokens=tokens, scored=tokens)
    frozen = given.weight_bytes if adapter is not None else 2
    for name, config in configs.items():
        whole = Shapes.of(config)
        small = adapter_shapes(config, (adapter if config is own else None) or _PUBLISHED)
        for training, weight in (("full", 4), ("LoRA", frozen), ("QLoRA", _FOUR_BITS)):
            is_full = training == "full"
            batch = replace(
                given,
                weight_bytes=weight,
                stream_bytes=max(2, int(weight)),
                reference_copy=given.reference_copy and (is_full or recipe.ref_model is not None),
            )
            is_own = config is own and training == ("full" if adapter is None else "LoRA")
            yield name, training, is_own, replace(whole, adapter=None if is_full else small), batch


def estimates(
    shapes: "Shapes", batch: "Batch", sharding: str, pairs: int, options: PlanOptions
) -> Iterator[Estimate]:
    """All splits in order of preference: without checkpointing first, then few batches a step.

    Args:
        batch: of one pair.
        pairs: of a step, on each GPU.
    """
    from tokenratio.training.memory import MemoryEstimate, moments
    from tokenratio.training.planning import flops, sharded, traffic

    if sharding != "DDP":  # weights are gathered, or kept, in the dtype that is multiplied
        batch = replace(batch, stream_bytes=batch.compute_bytes)
    for checkpointing in (False, True):
        for size in (size for size in range(pairs, 0, -1) if pairs % size == 0):
            batches = pairs // size
            one = replace(
                batch,
                tokens=size * batch.tokens,
                scored=size * batch.scored,
                checkpointing=checkpointing,
                accumulates=batches > 1,
            )
            memory = MemoryEstimate.at_peak(
                shapes,
                [
                    sharded(parts, shapes, one, sharding, options.gpus)
                    for parts in moments(shapes, one)
                ],
            )
            seconds = batches * flops(shapes, one) / (options.tflops * 1e12) * STEP_OVER_PRODUCTS
            sent = traffic(shapes, one, sharding, options.gpus, batches)
            if options.bandwidth is not None:
                seconds += sent / (options.bandwidth * 1e9)
            fits = memory.total <= _USABLE * options.gpu_memory * 2**30
            yield Estimate(sharding, (size, batches), checkpointing, memory, seconds, sent, fits)


def best(found: list[Estimate]) -> Estimate:
    """The first that fits; if none does, the one that needs least."""
    smallest = min(found, key=lambda estimate: estimate.memory.total)
    return next((estimate for estimate in found if estimate.fits), smallest)


COMMAND = Command(USAGE, plan, argument="one recipe", options=PlanOptions)
