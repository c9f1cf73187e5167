"""Log-probabilities of UltraFeedback's pairs, to compare with those on a model's card.

    python benchmarks/model_card.py DATA

DATA holds prompt, chosen and rejected as texts. Its pairs are read twice: as tokenratio reads them,
and as alignment-handbook's DPO script of 2024 does, whose recipe SmolLM2-Instruct has. That renders
prompt and response apart, so a template that puts a default system prompt in front of a
conversation without one puts it in front of the response too.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from tokenratio.data import prepare_pairs, read_rows
from tokenratio.evaluation.estimates import clustered_mean
from tokenratio.models.device import default_device
from tokenratio.models.loading import load_model, load_tokenizer
from tokenratio.models.packing import model_inputs
from tokenratio.models.token_requests import TokenRequest, language_model
from tokenratio.models.token_rows import TokenRow, score_rows
from tokenratio.types import CompletionBatch

SIDES = ("chosen", "rejected")
_MARK = "XmarkX"


@dataclass(frozen=True)
class Side:
    """A response: its prompt, its tokens, the number in each of its parts, whether it was cut."""

    prompt: str
    row: TokenRow
    parts: dict[str, int]
    is_cut: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a source of pairs: prompt, chosen, rejected")
    parser.add_argument("--model", default="package:smollm2")
    parser.add_argument("--dtype", default="bfloat16", help="the card's run had bfloat16")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--max_prompt_length", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_pairs", type=int, help="use only the first ones")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    model: Any = load_model(args.model, {"dtype": args.dtype}).to(default_device())
    texts = [row.fields for row in read_rows(args.data)][: args.num_pairs]
    readers = {"tokenratio": as_tokenratio, "alignment-handbook": as_handbook}
    for name, read in readers.items():
        sides = read(texts, tokenizer, args.max_length, args.max_prompt_length)
        started = time.perf_counter()
        rows = [side.row for side in sides]
        found = score_rows([model], rows, log_probs_of(model), batch_size=args.batch_size)
        seconds, num_tokens = time.perf_counter() - started, sum(row.num_tokens for row in rows)
        of = f"{len(sides) // 2} of {len(texts)} pairs, {args.dtype}"
        print(f"\n{name}: {of}, {num_tokens:,} tokens in {seconds:.0f} s")
        for index, side in enumerate(SIDES):
            print(report(side, sides[index::2], found[index::2]))


def as_tokenratio(
    texts: Sequence[Any], tokenizer: Any, max_length: int, max_prompt_length: int
) -> list[Side]:
    """One conversation, rendered whole; the response ends with the template's end of turn."""
    pairs = [
        {"prompt": turn("user", text["prompt"])}
        | {side: turn("assistant", text[side]) for side in SIDES}
        for text in texts
    ]
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    data = prepare_pairs(pairs, tokenizer, **limits)
    sides = []
    for row in data.dataset:
        prompt = tuple(row["prompt_ids"])
        for side in SIDES:
            ids = tuple(row[f"{side}_ids"])
            is_cut = ids[-1] != tokenizer.eos_token_id
            sides.append(Side(str(prompt), TokenRow(prompt, ids), {}, is_cut))
    return sides


def as_handbook(
    texts: Sequence[Any], tokenizer: Any, max_length: int, max_prompt_length: int
) -> list[Side]:
    """Prompt and response rendered apart, then joined and cut as TRL 0.11 did.

    A pair that is too long keeps its prompt's last tokens, and if it still is, the first tokens of
    both responses. All tokens after the prompt count, and EOS is added after the last newline.
    """

    def render(*turns: list[dict[str, str]]) -> str:
        messages = [message for each in turns for message in each]
        return str(tokenizer.apply_chat_template(messages, tokenize=False))

    def ids_of(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    before, _, after = render(turn("assistant", _MARK)).partition(_MARK)
    asked = turn("user", _MARK)
    header = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    header = header.removeprefix(render(asked))
    fixed = {
        "default system prompt": len(ids_of(before.removesuffix(header))),
        "header": len(ids_of(header)),
    }
    sides = []
    for text in texts:
        prompt = ids_of(render(turn("system", ""), turn("user", text["prompt"])))
        responses = [
            [*ids_of(render(turn("assistant", text[side]))), tokenizer.eos_token_id]
            for side in SIDES
        ]
        longest = room = max(map(len, responses))
        if len(prompt) + longest > max_length:
            prompt = prompt[-max_prompt_length:]
        if len(prompt) + longest > max_length:
            room = max_length - max_prompt_length
        for ids in responses:
            kept, is_cut = tuple(ids[:room]), len(ids) > room
            end = 0 if is_cut else len(ids_of(after)) + 1
            content = len(kept) - sum(fixed.values()) - end
            parts = {**fixed, "response": content, "end, newline, EOS": end}
            sides.append(Side(text["prompt"], TokenRow(tuple(prompt), kept), parts, is_cut))
    return sides


def turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def log_probs_of(model: Any) -> Callable[[CompletionBatch], Iterable[list[float]]]:
    """The log-probability of each response token, row by row."""

    def score(batch: CompletionBatch) -> Iterable[list[float]]:
        inputs = model_inputs(batch, language_model(model))
        request = TokenRequest(batch.states, batch.labels)
        log_probs: Tensor = model(**inputs, token_request=request)["log_probs"]
        lengths = batch.completion_mask.sum(1).tolist()
        return [part.tolist() for part in torch.split(log_probs.double(), lengths)]

    return score


def report(name: str, sides: Sequence[Side], log_probs: Sequence[list[float]]) -> str:
    """Mean of the summed log-probabilities, by prompt, and what it is made of."""
    sums = [sum(row) for row in log_probs]
    estimate = clustered_mean(sums, [side.prompt for side in sides])
    tokens = sum(map(len, log_probs))
    num_cut = sum(side.is_cut for side in sides)
    line = (
        f"  {name:9}{estimate.mean:9.2f} ± {estimate.standard_error:.2f}  median {median(sums):.1f}"
        f"  tokens {tokens / len(sides):.1f}, {sum(sums) / tokens:.3f} each  cut {num_cut}"
    )
    totals: dict[str, list[float]] = {}
    for side, row in zip(sides, log_probs, strict=True):
        begin = 0
        for part, length in side.parts.items():
            totals.setdefault(part, []).append(sum(row[begin : begin + length]))
            begin += length
    if totals:
        line += "\n    " + ", ".join(f"{part} {fmean(of):.2f}" for part, of in totals.items())
    return line


if __name__ == "__main__":
    main()
