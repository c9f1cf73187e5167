"""Tokens per second of sampling, against transformers: `python benchmarks/generate.py MODEL`.

Both draw from the model's whole distribution (or its top_p) for the same chat prompts, in batches
of the same rows, and stop at the same tokens. Cases alternate, round by round. `--write` puts the
table into docs/performance.md.
"""

import argparse
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from results import setting
from tokenratio.models.device import default_device
from tokenratio.models.generation import encode_prompts, eos_ids, sample_responses
from tokenratio.models.loading import load_model, load_tokenizer

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
THINGS = ("a dog", "an old camera", "bread", "a holiday in the mountains", "rain", "a new job")
READERS = ("a friend", "my boss", "the newspaper of our small village", "children", "a shop")
WAYS = ("Write a short note about {} for {}.", "What would you say about {} to {}? One sentence.")
PROMPTS = [
    [{"role": "user", "content": way.format(thing, reader)}]
    for thing in THINGS
    for reader in READERS
    for way in WAYS
]


def ours(model: Any, tokenizer: Any, prompts: list[Any], seed: int, **how: Any) -> int:
    """Tokens sampled by this library."""
    found = sample_responses(model, tokenizer, prompts, seed=seed, **how)
    return sum(len(sample.token_ids or ()) for row in found for sample in row)


def peer(
    model: Any,
    tokenizer: Any,
    prompts: list[Any],
    seed: int,
    *,
    num_samples: int,
    batch_size: int,
    **how: Any,
) -> int:
    """Tokens sampled by `model.generate(do_sample=True)`, in batches of similar length."""
    torch.manual_seed(seed)
    encoded = sorted(encode_prompts(tokenizer, prompts), key=len)
    ends = eos_ids(model, tokenizer)
    num_tokens, at_once = 0, batch_size // num_samples
    tokenizer.padding_side = "left"
    for start in range(0, len(encoded), at_once):
        rows = {"input_ids": [list(ids) for ids in encoded[start : start + at_once]]}
        inputs = tokenizer.pad(rows, return_tensors="pt").to(model.device)
        with torch.no_grad():
            found = model.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                repetition_penalty=1.0,
                num_return_sequences=num_samples,
                eos_token_id=ends,
                pad_token_id=tokenizer.pad_token_id,
                **how,
            )
        for row in found[:, inputs["input_ids"].shape[1] :].tolist():
            end = next((place for place, token in enumerate(row, 1) if token in ends), len(row))
            num_tokens += end
    return num_tokens


CASES: dict[str, Callable[..., int]] = {"tokenratio": ours, "transformers": peer}


def measure(args: argparse.Namespace) -> list[str]:
    """Lines of the table: one for each dtype and top_p."""
    tokenizer, lines = load_tokenizer(args.model), []
    for dtype in args.dtype.split(","):
        model: Any = load_model(args.model, {"dtype": dtype})
        model.to(default_device()).eval()
        for top_p in map(float, args.top_p.split(",")):
            how = {"num_samples": args.num_samples, "batch_size": args.batch_size, "top_p": top_p}
            for case in CASES.values():  # the first call is slower
                case(model, tokenizer, PROMPTS[:2], 0, **how, max_new_tokens=4)
            rates: dict[str, list[float]] = {name: [] for name in CASES}
            for number in range(args.rounds):
                for name, case in CASES.items():
                    began = time.perf_counter()
                    prompts = PROMPTS[: args.num_prompts]
                    tokens = case(
                        *(model, tokenizer, prompts, number),
                        **how,
                        max_new_tokens=args.max_new_tokens,
                    )
                    rates[name].append(tokens / (time.perf_counter() - began))
                    print(dtype, top_p, name, f"{tokens} tokens", f"{rates[name][-1]:.0f}/s")
            ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
            each = [f"{statistics.median(found):,.0f}" for found in rates.values()]
            spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}–{max(ratios):.2f}]"
            lines.append(f"| {dtype} | {top_p:g} | {' | '.join(each)} | {spread} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a chat model's folder or hub name")
    parser.add_argument("--dtype", default="bfloat16,float32")
    parser.add_argument("--top_p", default="1.0,0.95")
    parser.add_argument("--num_prompts", type=int, default=16)
    parser.add_argument("--num_samples", type=int, default=4)
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    args = parser.parse_args()
    where = setting(default_device().type, torch.get_num_threads(), args.dtype)
    text = "\n".join(
        [
            f"{args.num_prompts} prompts, {args.num_samples} responses to each of at most "
            f"{args.max_new_tokens} tokens, {args.batch_size} rows at once; {Path(args.model).name}"
            f" on {where.machine}, {where.threads} of {where.cores} cores; torch {where.torch}, "
            f"transformers {where.transformers}; median of {args.rounds} rounds.",
            "",
            f"| dtype | top_p | {' | '.join(f'{name}, tokens/s' for name in CASES)} | ratio |",
            "| --- | --- | --- | --- | --- |",
            *measure(args),
        ]
    )
    print(text)
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        pattern = "(<!-- generation -->\n).*?(<!-- end of generation -->)"
        page = re.sub(pattern, lambda found: f"{found[1]}{text}\n{found[2]}", page, flags=re.DOTALL)
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
