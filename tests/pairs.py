"""Statistics of random pairs for any test of a loss, and a linear model that makes real ones."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tokenratio.ratios import baseline_state_weight
from tokenratio.statistics import token_statistics
from tokenratio.types import PairBatch, PairStatistics, ResponseStatistics

SIGNALS = ("log_probs", "ref_log_probs", "kl", "contrast")
# What a method may need, by the name of the field that has it.
FIELD_OF_NEED = {"ref_log_probs": "ref_log_probs", "kl_ref_policy": "kl", "contrast": "contrast"}
ALL_NEEDS = frozenset({*FIELD_OF_NEED, "baseline"})


def random(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, float64."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def make_pairs(
    chosen_lengths: list[int], rejected_lengths: list[int], *, seed: int = 0, scale: float = 1.0
) -> PairStatistics:
    """Everything that any method needs, a leaf each, 0 past the responses' ends."""
    steps = torch.arange(max(*chosen_lengths, *rejected_lengths))
    sides = []
    for index, lengths in enumerate((chosen_lengths, rejected_lengths)):
        mask = steps < torch.tensor(lengths)[:, None]
        shape, begin = mask.shape, 10 * (2 * seed + index)
        values = {
            "log_probs": -2 + scale * random(*shape, seed=begin),
            "ref_log_probs": -2 + scale * random(*shape, seed=begin + 1),
            "kl": scale * random(*shape, seed=begin + 2).abs(),
            "contrast": random(*shape, seed=begin + 3),
        }
        values = {name: (value * mask).requires_grad_() for name, value in values.items()}
        sides.append(ResponseStatistics(mask=mask, **values))
    is_either = sides[0].mask | sides[1].mask
    weight = random(*is_either.shape, seed=20 * seed + 9) * is_either
    return PairStatistics(*sides, weight.requires_grad_())


def map_sides(
    pair: PairStatistics, change: Callable[[ResponseStatistics], ResponseStatistics]
) -> PairStatistics:
    """The pair with both responses changed alike."""
    return replace(pair, chosen=change(pair.chosen), rejected=change(pair.rejected))


def map_values(
    pair: PairStatistics,
    change: Callable[[Tensor], Tensor],
    of_mask: Callable[[Tensor], Tensor] = lambda mask: mask,
) -> PairStatistics:
    """The pair with every array changed, as leaves of their own, and every mask."""

    def leaf(value: Tensor | None) -> Tensor | None:
        return None if value is None else change(value.detach()).clone().requires_grad_()

    def side(response: ResponseStatistics) -> ResponseStatistics:
        changed = {name: leaf(getattr(response, name)) for name in SIGNALS}
        return ResponseStatistics(mask=of_mask(response.mask), **changed)

    return PairStatistics(side(pair.chosen), side(pair.rejected), leaf(pair.log_state_weight))


def fresh(pair: PairStatistics) -> PairStatistics:
    """A copy whose arrays are leaves of their own."""
    return map_values(pair, lambda value: value)


def only(pair: PairStatistics, needs: frozenset[str]) -> PairStatistics:
    """What a method with these needs is given."""
    unknown = {field: None for need, field in FIELD_OF_NEED.items() if need not in needs}
    weight = pair.log_state_weight if "baseline" in needs else None
    return replace(map_sides(pair, lambda side: replace(side, **unknown)), log_state_weight=weight)


def leaves(pair: PairStatistics) -> dict[str, Tensor]:
    """Its arrays by name."""
    named = {
        f"{side}.{name}": getattr(getattr(pair, side), name)
        for side in ("chosen", "rejected")
        for name in SIGNALS
    } | {"log_state_weight": pair.log_state_weight}
    return {name: value for name, value in named.items() if value is not None}


def gradients(loss: Tensor, pair: PairStatistics) -> dict[str, Tensor]:
    """Of the sum over pairs in every array; 0 where there is none."""
    named = leaves(pair)
    found = torch.autograd.grad(loss.sum(), list(named.values()), materialize_grads=True)
    return dict(zip(named, found, strict=True))


def swapped(pair: PairStatistics) -> PairStatistics:
    """The pair with its label the other way round."""
    weight = None if pair.log_state_weight is None else -pair.log_state_weight
    return PairStatistics(pair.rejected, pair.chosen, weight)


def linear_model(
    lengths: list[tuple[int, int]],
    *,
    vocabulary: int = 11,
    width: int = 4,
    seed: int = 0,
    moved: bool = True,
) -> tuple[PairBatch, Tensor, Tensor, Tensor]:
    """Pairs of responses of those lengths to prompts of two tokens, under a bigram 'model'."""
    rng = torch.Generator().manual_seed(seed)
    rows = [n for n, _ in lengths] + [n for _, n in lengths]
    length = 2 + max(rows)
    input_ids = torch.randint(vocabulary, (len(rows), length), generator=rng)
    half = len(lengths)
    input_ids[half:, :2] = input_ids[:half, :2]  # one prompt per pair
    position = torch.arange(length)
    ends = 2 + torch.tensor(rows)[:, None]
    batch = PairBatch(
        input_ids,
        (position < ends).long(),
        (position >= 2) & (position < ends),
        torch.arange(half),
    )
    embedding = random(vocabulary, width, seed=seed)
    ref_weight = random(vocabulary, width, seed=seed + 1)
    weight = ref_weight + (0.3 * random(vocabulary, width, seed=seed + 2) if moved else 0)
    return batch, embedding, weight.requires_grad_(), ref_weight


def model_statistics(
    batch: PairBatch,
    embedding: Tensor,
    weight: Tensor,
    ref_weight: Tensor,
    needs: frozenset[str] = ALL_NEEDS,
) -> PairStatistics:
    """What a method with these needs is given of `linear_model`, through the library."""
    hidden = embedding[batch.input_ids[batch.states]]
    with_kl = "kl_ref_policy" in needs
    of_tokens = token_statistics(hidden, weight, batch.labels, hidden, ref_weight, with_kl=with_kl)
    contrast = random(len(batch.labels), seed=77)
    kl = of_tokens.kl_ref_policy

    def sides(of_labels: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if of_labels is None else batch.split(batch.align(of_labels))

    chosen, rejected = (
        ResponseStatistics(*side)
        for side in zip(
            sides(of_tokens.log_probs),
            batch.split(batch.response_mask),
            sides(of_tokens.ref_log_probs),
            sides(kl),
            sides(contrast),
            strict=True,
        )
    )
    baseline = sides(hidden.square().sum(1))
    log_weight = baseline_state_weight(*baseline, chosen.mask | rejected.mask)
    return only(PairStatistics(chosen, rejected, log_weight), needs)
