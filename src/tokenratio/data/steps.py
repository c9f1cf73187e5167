"""Encoded pairs to batches of the steps that both responses have, and of nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from tokenratio.data.collation import lay_out, require_prompts


class StepCache(Protocol):
    """Reference hidden states of the responses, computed in an earlier pass."""

    def of_steps(self, rows: Sequence[int], lengths: Sequence[int]) -> dict[str, Tensor]:
        """`ref_hidden` of the first `lengths` tokens of both responses, as in `StepBatch`."""


@dataclass(frozen=True)
class StepCollator:
    """Collates rows of `prepare_pairs` into the fields of `StepBatch` (docs/method.md §5).

    What no step's loss can see is left out: the longer response past T = min(|y^w|, |y^l|), and
    token T itself, which is predicted but predicts nothing.

    Attributes:
        pad_token_id: fills the right of shorter rows.
        share_prompt: write a pair as one row, `prompt, chosen, rejected`: `always`, `never`, or
            `auto`, where the batch is then cheaper to compute.
        hidden_size: of the model, which `auto` weighs attention against.
        prune: leave the tokens out; False only to measure what it saves.
        cache: the reference's hidden states, if they were computed beforehand. (Its
            log-probabilities then are columns of the rows.)
    """

    pad_token_id: int
    share_prompt: Literal["auto", "always", "never"] = "never"
    hidden_size: int = 1
    prune: bool = True
    cache: StepCache | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Returns the fields of `StepBatch`; those of a shared prompt only where it is shared."""
        require_prompts(rows)
        lengths = [min(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
        if not all(lengths):
            raise ValueError(f"one of rows {[row['row'] for row in rows]} has an empty response")
        cut = [length - 1 if self.prune else None for length in lengths]
        sides = [
            [row[f"{side}_ids"][:end] for row, end in zip(rows, cut, strict=True)]
            for side in ("chosen", "rejected")
        ]
        prompts = [row["prompt_ids"] for row in rows]
        apart = [(prompt, side) for ids in sides for prompt, side in zip(prompts, ids, strict=True)]
        together = list(zip(prompts, *sides, strict=True))
        is_shared = self.share_prompt == "always" or (
            self.share_prompt == "auto" and self._cost(together) < self._cost(apart)
        )
        laid_out = together if is_shared else apart
        batch = lay_out(laid_out, self.pad_token_id)
        batch |= {
            "states": _states(laid_out, lengths, batch["input_ids"].shape[1]),
            "labels": _join(rows, "ids", lengths, torch.long),
            "lengths": torch.as_tensor(lengths),
            "past": torch.as_tensor(
                [abs(len(row["chosen_ids"]) - len(row["rejected_ids"])) for row in rows]
            ),
            "row": torch.as_tensor([row["row"] for row in rows]),
        }
        if not is_shared:
            del batch["branch"], batch["position_ids"]
        if "chosen_ref_log_probs" in rows[0]:
            batch["ref_log_probs"] = _join(rows, "ref_log_probs", lengths, torch.float32)
        if self.cache is not None:
            batch |= self.cache.of_steps([row["row"] for row in rows], lengths)
        return batch

    def _cost(self, laid_out: Sequence[Sequence[Sequence[int]]]) -> int:
        """Of padded rows: a position's products grow with the width, its attention with the row.

        The balance was measured on a CPU (docs/performance.md, "When a prompt is shared").
        """
        length = max(sum(len(part) for part in row) for row in laid_out)
        return len(laid_out) * length * (3 * self.hidden_size + length)


def _join(
    rows: Sequence[Mapping[str, Any]], what: str, lengths: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The first `lengths` values of the chosen sides, then those of the rejected sides."""
    parts = [
        torch.as_tensor(row[f"{side}_{what}"][:length], dtype=dtype)
        for side in ("chosen", "rejected")
        for row, length in zip(rows, lengths, strict=True)
    ]
    return torch.cat(parts)


def _states(
    laid_out: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int], width: int
) -> Tensor:
    """The flat position that predicts each label: the last of the prompt, then the response's."""
    pairs, is_shared = len(lengths), len(laid_out[0]) == 3
    states = []
    for side in (0, 1):
        for pair, length in enumerate(lengths):
            row = pair if is_shared else side * pairs + pair
            prompt, first = laid_out[row][0], laid_out[row][1]
            begin = len(prompt) + (len(first) if is_shared and side else 0)
            place = torch.arange(begin - 1, begin - 1 + length)
            place[0] = len(prompt) - 1
            states.append(row * width + place)
    return torch.cat(states)
