"""Sampling with a random stream for each row, independent of the other rows of its batch."""

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Numbers drawn at once for a row with a smaller vocabulary, because each call has a cost.
_DRAWN_AT_ONCE = 8192
# Tokens sorted at first for top_p.
_LIKELIEST = 256


class RowSampler:
    """A logits processor for greedy decoding: the largest of its scores is a draw from softmax.

    With E_v standard exponential, argmax p_v / E_v has the distribution p (the Gumbel-max trick).
    Rounding of p changes the token only if the two largest quotients are that close.

    Args:
        seeds: one for each row of the batch, non-negative, below 2^63.
        temperature: positive; divides the logits.
        top_p: keep the smallest set of tokens with this probability.
    """

    def __init__(self, seeds: Sequence[int], *, temperature: float, top_p: float) -> None:
        self._seeds, self._temperature, self._top_p = list(seeds), temperature, top_p
        self._generators: list[torch.Generator] = []
        self._block: Tensor | None = None
        self._step = 0

    def __call__(
        self, input_ids: Tensor, scores: Float[Tensor, "rows vocabulary"]
    ) -> Float[Tensor, "rows vocabulary"]:
        if self._temperature != 1:
            # the largest first: at the smallest temperatures the quotient alone would overflow
            scores = (scores - scores.amax(-1, keepdim=True)) / self._temperature
        probs = scores.softmax(-1)
        if self._top_p < 1:
            probs.masked_fill_(probs < nucleus_threshold(probs, self._top_p), 0.0)
        return probs.div_(self._exponential(probs))

    def keep(self, rows: Int[Tensor, "rows"]) -> None:
        """Draw for these rows of the batch only, in this order; their streams continue."""
        kept = rows.tolist()
        self._seeds = [self._seeds[row] for row in kept]
        if self._block is not None:
            self._block = self._block[rows]
            self._generators = [self._generators[row] for row in kept]

    def _exponential(self, like: Tensor) -> Tensor:
        rows, vocabulary = like.shape
        steps = max(1, _DRAWN_AT_ONCE // vocabulary)
        if self._block is None:
            # float32 has 2^24 values: a large vocabulary would draw some twice. MPS has no other.
            dtype = torch.float32 if like.device.type == "mps" else torch.float64
            self._block = torch.empty(rows, steps, vocabulary, dtype=dtype, device=like.device)
            self._generators = [torch.Generator(like.device).manual_seed(s) for s in self._seeds]
        if self._step % steps == 0:
            for row, generator in zip(self._block, self._generators, strict=True):
                row.uniform_(generator=generator)
            self._block.neg_().log1p_().neg_()
            # a uniform number may be 0, and 0 / 0 would win every comparison
            self._block.clamp_min_(torch.finfo(self._block.dtype).eps / 4)
        drawn = self._block[:, self._step % steps]
        self._step += 1
        return drawn.to(like.dtype)


def nucleus_threshold(
    probs: Float[Tensor, "rows vocabulary"], top_p: float
) -> Float[Tensor, "rows 1"]:
    """The smallest probability in each row's smallest set of tokens with a mass of `top_p`.

    Few tokens hold most of the mass, so only the likeliest are sorted: the whole vocabulary takes
    longer to sort than a small model to run.
    """
    rows, vocabulary = probs.shape
    threshold = probs.new_empty(rows, 1)
    size, left = min(_LIKELIEST, vocabulary), torch.arange(rows, device=probs.device)
    while len(left):
        likeliest = probs[left].topk(size).values
        mass = likeliest.cumsum(-1)
        last = (mass < top_p).sum(-1, keepdim=True).clamp_max_(size - 1)
        threshold[left] = likeliest.gather(-1, last)
        # The others need more tokens; rounding may keep a row's whole mass below top_p.
        left = left[(mass[:, -1] < top_p) & (size < vocabulary)]
        size = min(8 * size, vocabulary)
    return threshold


def stream_seed(seed: int, key: str, number: int) -> int:
    """The seed of a sample's stream: 63 bits of a SHA-256 of the run's seed, key and number."""
    digest = hashlib.sha256(f"{seed} {number} {key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) >> 1
