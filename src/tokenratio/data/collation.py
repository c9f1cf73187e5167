"""Encoded rows to padded batches in which response token t of both sides has one index."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tokenratio.errors import TokenRatioError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def padding_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id to pad with: the pad token, else EOS (padding is masked, so any id does).

    The tokenizer is not changed, because a pad token set here would be saved with it. One that has
    neither is refused.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise TokenRatioError(
        "The tokenizer has neither a pad nor an EOS token; set tokenizer.eos_token."
    )


@dataclass(frozen=True)
class CompletionCollator:
    """Collates rows of `prepare_completions` into the fields of `CompletionBatch`.

    Attributes:
        pad_token_id: fills the right of shorter rows.
        pad_to_multiple_of: round the length up to a multiple of this; None for the longest row's.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    sides: ClassVar[tuple[str, ...]] = ("completion",)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Returns `row` [examples]; ids, attention and completion mask [sides·examples, length].

        And `ref_log_probs` and `contrast` [tokens] where the rows have them.
        """
        require_prompts(rows)
        parts = [(row["prompt_ids"], row[f"{side}_ids"]) for side in self.sides for row in rows]
        padded = lay_out(parts, self.pad_token_id, self.pad_to_multiple_of)
        batch = {
            "row": torch.as_tensor([row["row"] for row in rows], dtype=torch.long),
            "input_ids": padded["input_ids"],
            "attention_mask": padded["attention_mask"],
            "completion_mask": padded["branch"] == 1,
        }
        for name in ("ref_log_probs", "contrast"):
            if f"{self.sides[0]}_{name}" in rows[0]:
                known = [row[f"{side}_{name}"] for side in self.sides for row in rows]
                batch[name] = torch.cat(
                    [torch.as_tensor(part, dtype=torch.float32) for part in known]
                )
        return batch


class PairCollator(CompletionCollator):
    """Collates rows of `prepare_pairs` into the fields of `PairBatch`: chosen first, then rejected.

    Both rows of a pair begin with the same prompt ids and are padded on the right, so response
    token t stands at index `len(prompt) + t` on both sides.
    """

    sides = ("chosen", "rejected")


def require_prompts(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise `ValueError` for an empty prompt: no state would predict the first response token."""
    for row in rows:
        if not len(row["prompt_ids"]):
            raise ValueError(f"row {row['row']} has an empty prompt")


def lay_out(
    rows: Sequence[Sequence[Sequence[int]]], pad_token_id: int, multiple: int | None = None
) -> dict[str, Tensor]:
    """Pads rows of a prompt and one or two responses, each of which continues the prompt.

    Args:
        rows: `(prompt, response, ...)` token ids of each row.
        multiple: round the length up to a multiple of this.
    Returns:
        `input_ids`, `attention_mask`, `branch` (0 for the prompt, then the number of the response,
        −1 for padding) and `position_ids`: int64 [rows, length].
    """
    length = max(sum(len(part) for part in row) for row in rows)
    if multiple is not None:
        length = -(-length // multiple) * multiple
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.long)
    branch = torch.full((len(rows), length), -1, dtype=torch.long)
    position_ids = torch.zeros((len(rows), length), dtype=torch.long)
    for index, parts in enumerate(rows):
        begin = 0
        for number, part in enumerate(parts):
            place = slice(begin, begin + len(part))
            first = len(parts[0]) if number else 0
            input_ids[index, place] = torch.as_tensor(part, dtype=torch.long)
            branch[index, place] = number
            position_ids[index, place] = torch.arange(first, first + len(part))
            begin += len(part)
    return {
        "input_ids": input_ids,
        "attention_mask": (branch >= 0).long(),
        "branch": branch,
        "position_ids": position_ids,
    }
