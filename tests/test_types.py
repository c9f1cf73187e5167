"""Masks and alignment against loops over rows."""

import dataclasses

import pytest
import torch

from tokenratio.types import (
    CompletionBatch,
    PairBatch,
    PairStatistics,
    ResponseStatistics,
    TokenStatistics,
)

# (prompt, response) of each row; the pair's prompt is the same, its responses differ in length.
PAIRS = [
    (([5, 6], [7, 8, 9]), ([5, 6], [10])),
    (([4], [11]), ([4], [12, 13])),
    (([1, 2, 3], [14, 15]), ([1, 2, 3], [16, 17])),
]
ROWS = [chosen for chosen, _ in PAIRS] + [rejected for _, rejected in PAIRS]


def make_batch(rows, kind=PairBatch, padding=2):
    """Padded on the right, by `padding` more than needed; padding is not 0 where it matters."""
    length = max(len(prompt) + len(response) for prompt, response in rows) + padding
    batch = {
        "input_ids": [p + r + [99] * (length - len(p) - len(r)) for p, r in rows],
        "attention_mask": [
            [1] * (len(p) + len(r)) + [0] * (length - len(p) - len(r)) for p, r in rows
        ],
    }
    completion_mask = [
        [False] * len(p) + [True] * len(r) + [False] * (length - len(p) - len(r)) for p, r in rows
    ]
    return kind(
        **{name: torch.tensor(values) for name, values in batch.items()},
        completion_mask=torch.tensor(completion_mask),
        row=torch.arange(len(rows) // 2),
    )


@pytest.mark.parametrize("padding", [0, 2])
def test_labels_are_the_response_tokens_in_order(padding):
    expected = [token for _, response in ROWS for token in response]
    assert make_batch(ROWS, padding=padding).labels.tolist() == expected


@pytest.mark.parametrize("padding", [0, 2])
def test_states_predict_the_labels(padding):
    """The state of a response token ends with the token before it, the last of the prompt first."""
    batch = make_batch(ROWS, padding=padding)
    expected = [before for p, response in ROWS for before in [p[-1], *response[:-1]]]
    assert batch.input_ids[batch.states].tolist() == expected
    for row, (prompt, response) in enumerate(ROWS):
        positions = [len(prompt) - 1 + step for step in range(len(response))]
        assert batch.states[row].nonzero().flatten().tolist() == positions
        assert [p + 1 for p in positions] == batch.completion_mask[row].nonzero().flatten().tolist()


def test_align_puts_each_token_at_its_index():
    batch = make_batch(ROWS)
    aligned = batch.align(batch.labels.double())
    assert aligned.dtype == torch.float64
    longest = max(len(response) for _, response in ROWS)
    assert aligned.tolist() == [[*r, *[0.0] * (longest - len(r))] for _, r in ROWS]
    assert batch.response_mask.tolist() == [
        [step < len(r) for step in range(longest)] for _, r in ROWS
    ]


def test_align_passes_gradients_through():
    batch = make_batch(ROWS)
    values = torch.arange(len(batch.labels), dtype=torch.float64, requires_grad=True)
    weights = torch.arange(batch.response_mask.numel()).view_as(batch.response_mask).double()
    (gradient,) = torch.autograd.grad((batch.align(values) * weights).sum(), values)
    assert gradient.tolist() == weights[batch.response_mask].tolist()


def test_pair_mask_ends_with_the_shorter_response():
    """T = min(|y^w|, |y^l|), not the maximum (docs/method.md §2)."""
    mask = make_batch(ROWS).pair_mask
    for pair, ((_, chosen), (_, rejected)) in enumerate(PAIRS):
        shared = min(len(chosen), len(rejected))
        assert mask[pair].tolist() == [step < shared for step in range(mask.shape[1])]
    assert mask.sum(1).tolist() == [1, 1, 2]


def test_split_is_chosen_then_rejected():
    batch = make_batch(ROWS)
    chosen, rejected = batch.split(batch.align(batch.labels.float()))
    assert chosen[:, 0].tolist() == [7, 11, 14]
    assert rejected[:, 0].tolist() == [10, 12, 16]


def test_pair_statistics_mask_is_the_same_overlap():
    batch = make_batch(ROWS)
    chosen_mask, rejected_mask = batch.split(batch.response_mask)
    zeros = torch.zeros(chosen_mask.shape)
    pairs = PairStatistics(
        ResponseStatistics(zeros, chosen_mask), ResponseStatistics(zeros, rejected_mask)
    )
    assert torch.equal(pairs.pair_mask, batch.pair_mask)
    assert not torch.equal(pairs.pair_mask, chosen_mask | rejected_mask)


def test_response_statistics():
    batch = make_batch(ROWS)
    log_probs, ref_log_probs = (
        batch.align(torch.arange(len(batch.labels)) * scale) for scale in (-0.5, -0.25)
    )
    response = ResponseStatistics(log_probs, batch.response_mask, ref_log_probs)
    torch.testing.assert_close(response.log_ratio, ref_log_probs, rtol=0, atol=0)
    assert response.lengths.tolist() == [len(tokens) for _, tokens in ROWS]
    assert response.lengths.dtype == log_probs.dtype
    assert (response.kl, response.contrast) == (None, None)
    with pytest.raises(ValueError, match="no reference"):
        ResponseStatistics(log_probs, batch.response_mask).log_ratio  # noqa: B018


def test_what_is_not_known_beforehand_is_none():
    batch = make_batch(ROWS)
    assert (batch.ref_log_probs, batch.contrast) == (None, None)
    zeros = ResponseStatistics(torch.zeros(3, 3), batch.response_mask[:3])
    assert PairStatistics(zeros, zeros).log_state_weight is None


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_batch(ROWS, CompletionBatch).row = torch.zeros(1)
    statistics = TokenStatistics(torch.zeros(2))
    assert statistics.ref_log_probs is None
    assert statistics.kl_ref_policy is None
