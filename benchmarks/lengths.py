"""The batches that every case gets: real response lengths, random token ids.

What a step costs depends on the lengths of prompt, chosen and rejected response and on nothing else
in the text. So the lengths are drawn from preference data and the ids are seeded noise.
"""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tokenratio.data import LengthGroupedSampler

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
# A chat template's frame around the user's turn (Llama 3's has ten tokens), and EOS.
_TEMPLATE_TOKENS, _EOS_TOKENS = 10, 1
_TOKENIZER_VOCABULARY = 8192
# Ids below this are special tokens in most vocabularies; none of them is drawn.
_FIRST_ID = 10

Lengths = tuple[int, int, int]  # tokens of prompt, chosen, rejected; responses with their EOS


@dataclass(frozen=True)
class Workload:
    """Where the lengths of a benchmark come from.

    Attributes:
        file: pairs, below `DATA`.
        max_length: pairs with a longer row are left out, so that a step fits two CPU cores.
        prompt_tokens: mean prompt length that the draw comes near to; None for the file's own mean.
        fallback: without the data: mean tokens of prompt and of a response. The two responses'
            lengths then differ as in the real data: mean min/max 0.55.
    """

    file: str
    max_length: int
    prompt_tokens: int | None
    fallback: tuple[int, int]


WORKLOADS = {
    # The published training data, and the default.
    "ultrafeedback": Workload("ultrafeedback_sample/train.jsonl", 512, None, (108, 142)),
    # Three prompt lengths, for what prefix sharing saves.
    "tldr": Workload("tldr/train.jsonl", 1024, 366, (366, 37)),
    "hh": Workload("hh/test.jsonl", 1024, 124, (124, 49)),
    "alpaca": Workload("alpaca_pairs_small/train.jsonl", 1024, 46, (46, 87)),
}
DEFAULT = "ultrafeedback"


def draw(name: str, *, batches: int, pairs: int, seed: int = 0) -> list[list[Lengths]]:
    """`batches` lists of `pairs` lengths, as training meets them: of 500 seeded draws the best.

    A batch's pairs are alike in the length that is left of them (`LengthGroupedSampler`, this
    library's default order); every case gets these batches. A few batches drawn once could have
    any mean; those taken are nearest to the file's in mean prompt, mean response and mean min/max.
    """
    workload = WORKLOADS[name]
    population = measured(workload) if has_data() else _synthetic(workload, seed)
    target = _summary(population)
    if workload.prompt_tokens is not None:
        target = (workload.prompt_tokens, *target[1:])
    left = [prompt + 2 * min(sides) for prompt, *sides in population]
    order = list(LengthGroupedSampler(left, pairs, seed=seed))
    whole = len(order) // pairs * pairs
    grouped = [[population[row] for row in order[i : i + pairs]] for i in range(0, whole, pairs)]
    rng = random.Random(seed)
    draws = [rng.sample(grouped, batches) for _ in range(500)]

    def distance(sample: Sequence[Sequence[Lengths]]) -> float:
        values = zip(_summary([pair for batch in sample for pair in batch]), target, strict=True)
        return sum(math.log(value / wanted) ** 2 for value, wanted in values)

    return min(draws, key=distance)


def has_data() -> bool:
    return all((DATA / workload.file).is_file() for workload in WORKLOADS.values())


def measured(workload: Workload) -> list[Lengths]:
    """Lengths in tokens of a byte-level BPE trained on the pairs of all workloads."""
    tokenizer = _tokenizer()
    rows = _read(workload)
    sides = []
    for key in ("prompt", "chosen", "rejected"):
        encoded = tokenizer.encode_batch([row[key] for row in rows])
        frame = _TEMPLATE_TOKENS if key == "prompt" else _EOS_TOKENS
        sides.append([len(encoding.ids) + frame for encoding in encoded])
    return [
        (prompt, chosen, rejected)
        for prompt, chosen, rejected in zip(*sides, strict=True)
        if prompt + max(chosen, rejected) <= workload.max_length
    ]


_CACHE: list[Tokenizer] = []


def _tokenizer() -> Tokenizer:
    if not _CACHE:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=_TOKENIZER_VOCABULARY,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        texts = (
            row[key]
            for workload in WORKLOADS.values()
            for row in _read(workload)
            for key in ("prompt", "chosen", "rejected")
        )
        tokenizer.train_from_iterator(texts, trainer)
        _CACHE.append(tokenizer)
    return _CACHE[0]


def _read(workload: Workload) -> list[dict[str, str]]:
    # Not splitlines: some texts hold U+2028.
    lines = (DATA / workload.file).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def _synthetic(workload: Workload, seed: int) -> list[Lengths]:
    rng = random.Random(seed)
    prompt_mean, response_mean = workload.fallback

    def around(mean: float, spread: float) -> float:
        return mean * math.exp(rng.gauss(0, spread) - spread**2 / 2)

    rows = []
    while len(rows) < 1000:
        prompt, response = around(prompt_mean, 0.5), around(response_mean, 0.5)
        # E exp(-|x|) = 0.54 for x of standard deviation 0.95; cutting long rows makes it 0.55.
        ratio = math.exp(rng.gauss(0, 0.95) / 2)
        row = tuple(max(1, round(n)) for n in (prompt, response * ratio, response / ratio))
        if row[0] + max(row[1:]) <= workload.max_length:
            rows.append(row)
    return rows


def _summary(lengths: Sequence[Lengths]) -> tuple[float, float, float, float]:
    """Mean prompt, mean response, mean min/max of the responses, and share of tokens compared."""
    return (
        fmean(prompt for prompt, _, _ in lengths),
        fmean((chosen + rejected) / 2 for _, chosen, rejected in lengths),
        fmean(min(pair) / max(pair) for _, *pair in lengths),
        sum(2 * min(pair) for _, *pair in lengths) / sum(sum(pair) for _, *pair in lengths),
    )


def describe(batches: Sequence[Sequence[Lengths]]) -> str:
    prompt, response, ratio, share = _summary([pair for batch in batches for pair in batch])
    return (
        f"mean prompt {prompt:.0f}, response {response:.0f} tokens, mean min/max {ratio:.2f}, "
        f"{share:.0%} of response tokens within the shorter one"
    )


def token_rows(
    batches: Sequence[Sequence[Lengths]], vocabulary: int, seed: int = 0
) -> list[list[dict]]:
    """Encoded pairs as both collators take them: `row`, `prompt_ids`, `chosen_ids`, ..."""
    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(_FIRST_ID, vocabulary) for _ in range(count)]

    return [
        [
            {"row": row, "prompt_ids": ids(p), "chosen_ids": ids(c), "rejected_ids": ids(r)}
            for row, (p, c, r) in enumerate(batch)
        ]
        for batch in batches
    ]
