"""An entry of the reference cache on disk: its layout, writing and reading.

An entry is a folder with a safetensors file and a note of what it was made from. It gets its name
only when it is complete, and its values are checked against their SHA-256 whenever a run opens it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypedDict

import numpy as np
import torch
from datasets import Dataset, List, Value
from safetensors import safe_open
from torch import Tensor

from tokenratio.data import PreparedData, entries
from tokenratio.data.length_grouping import token_counts
from tokenratio.errors import TokenRatioError, first_line
from tokenratio.records import read_record
from tokenratio.run_folder import versions

What = Literal["log_probs", "hidden"]
SIDES = ("chosen", "rejected")

_VALUES, _NOTE = "values.safetensors", "entry.json"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


class ReferenceCache:
    """A complete entry, read from disk row by row.

    Can be pickled: each process opens the file for itself.

    Args:
        folder: the entry.
        what: what it holds.
    """

    def __init__(self, folder: Path, what: What) -> None:
        self.folder, self.what = folder, what
        self._opened: tuple[dict[str, Any], dict[str, list[int]]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": None}

    def read(self, what: What, row: int) -> tuple[Tensor, Tensor]:
        """The reference's outputs on one row, chosen and rejected.

        Args:
            what: `log_probs`: log π_ref(y_t|s_t) in nats, float32, `[chosen tokens], [rejected
                tokens]`; or `hidden`: the final states that predict the tokens of the steps t < T
                that both responses have, `[T, hidden]` each, in the reference's own dtype.
            row: the row's index in the encoded data set.
        """
        if what != self.what:
            raise ValueError(f"this entry holds {self.what}, not {what}")
        if self._opened is None:
            file = safe_open(self.folder / _VALUES, framework="pt")
            offsets = {side: file.get_tensor(f"{side}_offsets").tolist() for side in SIDES}
            self._opened = {side: file.get_slice(side) for side in SIDES}, offsets
        values, offsets = self._opened
        if not 0 <= row < len(offsets["chosen"]) - 1:
            raise IndexError(f"row {row} of {len(offsets['chosen']) - 1}")
        chosen, rejected = (
            values[side][offsets[side][row] : offsets[side][row + 1]] for side in SIDES
        )
        return chosen, rejected

    def of_steps(self, rows: Sequence[int], lengths: Sequence[int]) -> dict[str, Tensor]:
        """The first `lengths` values of the chosen side of `rows`, then those of the rejected side.

        Returns:
            `ref_log_probs` [tokens] or `ref_hidden` [tokens, hidden].
        """
        pairs = [self.read(self.what, row) for row in rows]
        flat = [
            pair[side][:length]
            for side in (0, 1)
            for pair, length in zip(pairs, lengths, strict=True)
        ]
        return {f"ref_{self.what}": torch.cat(flat)}

    def attach(self, data: PreparedData) -> PreparedData:
        """The rows with two more columns, `chosen_ref_log_probs` and `rejected_ref_log_probs`."""
        rows = range(len(data.dataset))
        pairs = [[side.numpy() for side in self.read("log_probs", row)] for row in rows]
        return replace(data, dataset=with_token_values(data.dataset, "ref_log_probs", pairs))


def with_token_values(
    dataset: Dataset, name: str, pairs: Sequence[Sequence[np.ndarray]]
) -> Dataset:
    """The rows with two more columns, a float32 for each token of the chosen and rejected side."""
    for side, values in zip(SIDES, zip(*pairs, strict=True), strict=True):
        feature = List(Value("float32"))
        dataset = dataset.add_column(f"{side}_{name}", list(values), feature=feature)
    return dataset


@dataclass(frozen=True)
class FileLayout:
    """Where each row's values are in a safetensors file, and the file's header.

    safetensors writes whole tensors; these are written row by row by several processes, and may
    exceed the memory.

    Attributes:
        begins: the byte at which a tensor begins, by its name.
        offsets: for each side, which token of the tensor a row begins with; then the end.
    """

    header: bytes
    begins: dict[str, int]
    offsets: dict[str, np.ndarray]
    dtype: torch.dtype
    token_bytes: int
    size: int

    @classmethod
    def of(
        cls, data: PreparedData, what: What, shape: tuple[int, ...], dtype: torch.dtype
    ) -> "FileLayout":
        """The layout of an entry; `shape` and `dtype` are those of one token's value."""
        counts = token_counts(data.dataset)
        tokens = {side: counts[f"{side}_ids"] for side in SIDES}
        if what == "hidden":
            tokens = dict.fromkeys(SIDES, np.minimum(*tokens.values()))
        offsets = {side: np.concatenate([[0], np.cumsum(tokens[side])]) for side in SIDES}
        # Offsets first: the widest type, so that what follows is aligned.
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]
        tensors = {f"{side}_offsets": (torch.int64, (len(offsets[side]),)) for side in SIDES}
        tensors |= {side: (dtype, (int(offsets[side][-1]), *shape)) for side in SIDES}
        header: dict[str, dict[str, Any]] = {}
        end = 0
        for name, (its_dtype, its_shape) in tensors.items():
            begin, end = end, end + its_dtype.itemsize * math.prod(its_shape)
            places = {"shape": its_shape, "data_offsets": (begin, end)}
            header[name] = {"dtype": _DTYPES[its_dtype], **places}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        text = len(text).to_bytes(8, "little") + text
        begins = {name: len(text) + entry["data_offsets"][0] for name, entry in header.items()}
        token_bytes = dtype.itemsize * math.prod(shape)
        return cls(text, begins, offsets, dtype, token_bytes, len(text) + end)

    def tokens(self, side: str, row: int) -> int:
        return int(self.offsets[side][row + 1] - self.offsets[side][row])

    def write(self, file: BinaryIO, side: str, row: int, values: Tensor) -> None:
        """Put a row's values where they belong."""
        file.seek(self.begins[side] + int(self.offsets[side][row]) * self.token_bytes)
        file.write(values.to(self.dtype).contiguous().flatten().view(torch.uint8).numpy().data)


class _Note(TypedDict):
    key: str
    sha256: str


def find_flaw(folder: Path) -> str | None:
    """What is wrong with an entry; None if it is complete and unchanged."""
    try:
        note = read_record(_Note, folder / _NOTE)
        if note["key"] != folder.name:
            return "it is another entry's folder, renamed"
        if note["sha256"] != entries.file_digest(folder / _VALUES):
            return f"{_VALUES} has changed since it was written"
    except (OSError, TokenRatioError) as error:
        return first_line(error)
    return None


def begin_entry(folder: Path, layout: FileLayout) -> Path:
    """Make an unfinished entry next to `folder`, under a unique name.

    Its file has its full size, so that several processes can write into it.
    """
    work = entries.begin_entry(folder)
    with (work / _VALUES).open("wb") as file:
        file.write(layout.header)
        for side in SIDES:
            file.write(layout.offsets[side].astype("<i8").data)
        file.truncate(layout.size)
    return work


def open_to_write(work: Path) -> BinaryIO:
    """The values of an unfinished entry."""
    return (work / _VALUES).open("r+b")


def finish_entry(work: Path, folder: Path, ingredients: Mapping[str, Any]) -> None:
    """Give an entry its name; if another run was faster, its entry is kept."""
    note = {
        "key": folder.name,
        "sha256": entries.file_digest(work / _VALUES),
        "ingredients": ingredients,
        "versions": versions(),
    }
    text = json.dumps(note, indent=2, default=str) + "\n"
    (work / _NOTE).write_text(text, encoding="utf-8")
    entries.finish_entry(work, folder, find_flaw)
