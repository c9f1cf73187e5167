"""Epoch order in which rows of similar length share a batch."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc
from torch.utils.data import Sampler

if TYPE_CHECKING:
    from datasets import Dataset

# Groups of batches sorted at once. More save padding; fewer mix a batch's rows better from epoch to
# epoch. At 50, as in transformers, little padding is left.
_GROUPS_PER_CHUNK = 50
# At least this many chunks an epoch, or a small data set would form the same batches every time.
_MIN_CHUNKS = 4


def token_counts(dataset: "Dataset") -> dict[str, np.ndarray]:
    """Tokens of every row, for each column of ids (`prompt_ids`, `chosen_ids`, …): int64 [rows]."""
    table = dataset.with_format("arrow")[:]
    names = [name for name in table.column_names if name.endswith("_ids")]
    return {
        name: pc.list_value_length(table[name]).to_numpy().astype(np.int64, copy=False)
        for name in names
    }


def row_lengths(dataset: "Dataset", *, pruned: bool = False, shared: bool = False) -> np.ndarray:
    """Tokens that a row of `prepare_pairs` or `prepare_completions` takes in a batch: int64 [rows].

    Args:
        dataset: columns `prompt_ids` and one or two of response ids.
        pruned: only the first T = min(|y^w|, |y^l|) response tokens of a pair are run
            (docs/method.md §5); otherwise the longer response counts.
        shared: both responses follow the prompt in one row, so both count.
    """
    counts = token_counts(dataset)
    prompts = counts.pop("prompt_ids")
    responses: np.ndarray = (np.minimum if pruned else np.maximum).reduce(list(counts.values()))
    lengths: np.ndarray = prompts + responses * (2 if shared else 1)
    return lengths


class LengthGroupedSampler(Sampler[int]):
    """Shuffles rows so that batches run at the same time have similar lengths.

    An epoch's rows are permuted and cut into chunks of about 50 groups; a chunk's rows are sorted
    by length and cut into groups of `num_processes` batches, and the groups are shuffled.
    Successive batches are of any length; transformers' sampler of this name instead yields sorted
    batches, which train from long to short over and over.

    The order depends only on `seed` and the epoch, so a resumed run continues in the same order.
    Call `set_epoch` before iterating; accelerate's data loaders do, except one that skips batches
    on several processes, where the trainer must.

    Each row comes once an epoch. Only the last batch may be short; its length is random. The first
    epoch begins with the group of the longest row, so that lack of memory shows at the first step.

    Args:
        lengths: tokens of each row, see `row_lengths`.
        batch_size: rows of a batch on one process.
        seed: at least 0.
        num_processes: how many processes take consecutive batches.
    Raises:
        ValueError: a batch size or number of processes below 1.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, *, seed: int, num_processes: int = 1
    ) -> None:
        if batch_size < 1 or num_processes < 1:
            raise ValueError(
                f"batch_size and num_processes must be at least 1, not {batch_size} and "
                f"{num_processes}"
            )
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.group_size = batch_size * num_processes
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (0, 1, …) whose order the next iteration takes."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        # Seeded with both numbers, not their sum: seed 1's first epoch is not seed 0's second.
        rng = np.random.default_rng((self.seed, self.epoch))
        rows = rng.permutation(len(self))
        if not len(rows):
            return
        starts_longest = self.epoch == 0
        if starts_longest:  # into the first chunk with it
            longest = int(np.argmax(self.lengths[rows]))
            rows[[0, longest]] = rows[[longest, 0]]
        num_groups = -(-len(rows) // self.group_size)
        num_chunks = max(_MIN_CHUNKS, -(-num_groups // _GROUPS_PER_CHUNK))
        size = -(-num_groups // num_chunks) * self.group_size
        for begin in range(0, len(rows), size):
            keep_first = starts_longest and begin == 0
            yield from self._grouped(rows[begin : begin + size], rng, keep_first).tolist()

    def _grouped(self, rows: np.ndarray, rng: np.random.Generator, keep_first: bool) -> np.ndarray:
        """Sort a chunk's rows by length, cut them into groups, and shuffle the groups."""
        # Stable: rows of equal length stay in the random order they came in.
        rows = rows[np.argsort(-self.lengths[rows], kind="stable")]
        num_full, rest = divmod(len(rows), self.group_size)
        # The incomplete group is cut out at random: otherwise the shortest rows always came last.
        begin = rng.integers(num_full + 1) * self.group_size
        incomplete = rows[begin : begin + rest]
        full = np.concatenate([rows[:begin], rows[begin + rest :]])
        order = rng.permutation(num_full)
        if keep_first and num_full:
            order = np.concatenate([[0], order[order != 0]])
        return np.concatenate([full.reshape(num_full, self.group_size)[order].ravel(), incomplete])
