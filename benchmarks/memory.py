"""Peak memory of small steps, which the formula of `training/memory.py` is held to.

`python benchmarks/memory.py` measures every case in a process of its own and writes
`memory_results.csv` anew; tests/training/test_memory.py compares the formula with it. A step is
both forward passes, loss and backward pass, without optimizer. A pair's rows are computed whole.
"""

import sys
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

import worker
from lengths import token_rows
from measure import peak_memory, start_memory
from models import ModelSpec, build
from ours import ours
from results import append, setting

RESULTS = Path(__file__).with_name("memory_results.csv")


@dataclass(frozen=True)
class MemoryCase:
    """What is measured.

    Attributes:
        weights: dtype of the frozen weights, or of all in full fine-tuning.
        autocast: products are in bfloat16.
        pairs, length: of a batch, and tokens of each of its rows; the first is a little shorter.
    """

    case: str
    hidden: int = 384
    layers: int = 6
    heads: int = 12
    kv_heads: int = 4
    intermediate: int = 1024
    vocabulary: int = 4000
    tied: bool = False
    lora_rank: int = 0
    dropout: float = 0.0
    loss: str = "tbpo_a"
    weights: str = "float32"
    autocast: bool = False
    checkpointing: bool = False
    pairs: int = 4
    length: int = 192

    @property
    def spec(self) -> ModelSpec:
        sizes = self.hidden, self.layers, self.heads, self.intermediate, self.vocabulary, self.tied
        return ModelSpec(*sizes, kv_heads=self.kv_heads, lora_rank=self.lora_rank or None)

    @property
    def lengths(self) -> list[tuple[int, int, int]]:
        """Prompt, chosen and rejected; half of a row is prompt."""
        half = self.length // 2
        return [(half - 8 * (pair == 0), half, half) for pair in range(self.pairs)]


@dataclass(frozen=True)
class MemoryRow(MemoryCase):
    """A case with its peak over the loaded models, gradients included, in bytes."""

    peak_bytes: int = 0


_FULL, _LORA = MemoryCase("full"), MemoryCase("lora", lora_rank=16)
_HALF = replace(_LORA, weights="bfloat16", autocast=True)
CASES = [
    _FULL,
    replace(_FULL, case="full, checkpointing", checkpointing=True),
    replace(_FULL, case="full, autocast", autocast=True),
    replace(_FULL, case="full, autocast, checkpointing", autocast=True, checkpointing=True),
    replace(_FULL, case="full, dpo", loss="dpo"),
    replace(_FULL, case="full, wide vocabulary", vocabulary=48_000, layers=4),
    replace(_FULL, case="full, long rows, no grouping", heads=6, kv_heads=6, length=512, pairs=2),
    _LORA,
    replace(_LORA, case="lora, checkpointing", checkpointing=True),
    replace(_LORA, case="lora, autocast", autocast=True),
    replace(_LORA, case="lora, autocast, checkpointing", autocast=True, checkpointing=True),
    replace(_HALF, case="lora, bfloat16 weights, autocast"),
    replace(_HALF, case="lora, bfloat16 weights, autocast, checkpointing", checkpointing=True),
    replace(_HALF, case="lora, bfloat16 weights, autocast, dropout", dropout=0.05),
    replace(_HALF, case="lora, bfloat16 weights, autocast, wide vocabulary", vocabulary=48_000),
    MemoryCase(
        *("lora, autocast, SmolLM2's shape", 576, 30, 9, 3, 1536, 49_152, True),
        lora_rank=32,
        autocast=True,
        pairs=2,
    ),
]


def main() -> int:
    if "--worker" in sys.argv:
        worker.answer({"peak_bytes": peak(MemoryCase(**worker.task()))})
        return 0
    where = setting("cpu", 1, "mixed")
    RESULTS.unlink(missing_ok=True)
    for case in CASES:
        reading = worker.measured(__file__, asdict(case), threads=1, name=case.case)
        append(RESULTS, where, MemoryRow(**asdict(case), **reading))
        print(f"{case.case}: {reading['peak_bytes'] / 2**20:.0f} MiB", flush=True)
    return 0


def peak(case: MemoryCase) -> int:
    """Bytes of one step over the loaded models."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    models = build(case.spec, device="cpu", dtype=torch.float32)
    for model in (models.policy, models.reference):
        for name, parameter in model.named_parameters():
            if "lora" not in name:
                parameter.data = parameter.data.to(getattr(torch, case.weights))
    for module in models.policy.modules():
        if case.dropout and isinstance(module, LoraLayer):
            module.lora_dropout["default"] = nn.Dropout(case.dropout)
    if case.checkpointing:
        models.inner.activation_checkpointing_enable()
    step = ours(case.loss, share=False)(models)
    for lengths in ([(3, 2, 2)], case.lengths):  # a tiny step first: it pages in the libraries
        (rows,) = token_rows([lengths], case.vocabulary)
        batch = step.collate(rows)
        models.policy.zero_grad(set_to_none=True)
        before = start_memory(cuda=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            value = step.loss(batch)
        value.backward()
    return peak_memory(cuda=False) - before


if __name__ == "__main__":
    sys.exit(main())
