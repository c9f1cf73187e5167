"""Batches of steps: which tokens are compared, which position predicts each, what is left out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenratio.data import StepCollator
from tokenratio.types import StepBatch

PAD = 0
# The pad id occurs among the tokens too: masks must not be guessed from it.
tokens = st.lists(st.integers(0, 9), min_size=1, max_size=7)
pairs = st.lists(st.tuples(tokens, tokens, tokens), min_size=1, max_size=4)


def rows_of(triples):
    return [
        {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r, "row": 10 + i}
        for i, (p, c, r) in enumerate(triples)
    ]


def prefixes(batch):
    """For every label, the tokens that its state has seen, found by walking the layout."""
    width = batch.input_ids.shape[1]
    for state in batch.states.tolist():
        row, index = divmod(state, width)
        ids, mask = batch.input_ids[row, : index + 1], batch.attention_mask[row, : index + 1]
        assert mask.all()
        if batch.branch is not None:
            branch = batch.branch[row, : index + 1]
            seen = (branch == 0) | (branch == branch[-1])
            positions = batch.position_ids[row, : index + 1][seen]
            assert positions.tolist() == list(range(int(seen.sum())))
            ids = ids[seen]
        yield ids.tolist()


@given(triples=pairs, share=st.booleans(), prune=st.booleans())
@settings(deadline=None, derandomize=True)
def test_every_state_has_seen_what_precedes_its_label(triples, share, prune):
    collator = StepCollator(PAD, share_below=float("inf") if share else 0.0, prune=prune)
    batch = StepBatch(**collator(rows_of(triples)))
    assert (batch.branch is not None) == share
    lengths = [min(len(c), len(r)) for _, c, r in triples]
    assert batch.lengths.tolist() == lengths
    assert batch.row.tolist() == [10 + i for i in range(len(triples))]
    assert batch.past.tolist() == [abs(len(c) - len(r)) for _, c, r in triples]
    expected = [
        (prompt + side[:t], side[t])
        for index in (1, 2)
        for (prompt, side), length in zip([(x[0], x[index]) for x in triples], lengths, strict=True)
        for t in range(length)
    ]
    assert list(zip(prefixes(batch), batch.labels.tolist(), strict=True)) == expected
    run = sum(len(p) * (1 if share else 2) for p, _, _ in triples)
    kept = (
        sum(2 * (n - 1) for n in lengths) if prune else sum(len(c) + len(r) for _, c, r in triples)
    )
    assert batch.attention_mask.sum() == run + kept


@given(triples=pairs)
@settings(deadline=None, derandomize=True)
def test_values_are_aligned_by_step(triples):
    batch = StepBatch(**StepCollator(PAD)(rows_of(triples)))
    chosen, rejected = (batch.align(side.double()) for side in batch.labels.chunk(2))
    for pair, (_, c, r) in enumerate(triples):
        length = min(len(c), len(r))
        assert chosen[pair].tolist()[:length] == c[:length]
        assert rejected[pair].tolist()[:length] == r[:length]
        assert not chosen[pair, length:].any()
        assert not rejected[pair, length:].any()
    assert batch.step_mask.sum() == len(batch.labels) // 2


def test_the_prompt_is_shared_where_it_saves_enough():
    def batch_of(prompt, response):
        row = {"prompt_ids": [1] * prompt, "row": 0}
        rows = [row | {"chosen_ids": [2] * response, "rejected_ids": [3] * response}]
        return StepCollator(PAD, share_below=0.75)(rows)

    assert "branch" in batch_of(30, 10)  # 48 positions instead of 78
    assert "branch" not in batch_of(5, 30)  # 63 instead of 68
    long_prompt, short_prompt = [1] * 30, [1]
    rows = rows_of([(long_prompt, [2] * 4, [3] * 4), (short_prompt, [2] * 40, [3] * 40)])
    # 2 rows of 79 instead of 4 of 40: the padding undoes it.
    assert "branch" not in StepCollator(PAD, share_below=0.9)(rows)


def test_what_the_reference_said_before_comes_along():
    class Cache:
        def of_steps(self, rows, lengths):
            return {"ref_log_probs": torch.full((2 * sum(lengths),), float(rows[0]))}

    batch = StepCollator(PAD, cache=Cache())(rows_of([([1], [2, 3], [4, 5, 6])]))
    assert batch["ref_log_probs"].tolist() == [10.0] * 4


def test_empty_prompt_is_refused():
    with pytest.raises(ValueError, match=r"\[10, 11\] has an empty prompt"):
        StepCollator(PAD)(rows_of([([1], [2], [3]), ([], [2], [3])]))


def test_arrays_are_taken_as_lists_are():
    triples = [([1, 2], [3, 4, 5], [6, 7]), ([1], [8], [9, 9])]
    arrays = [
        {k: v if k == "row" else torch.tensor(v).numpy() for k, v in row.items()}
        for row in rows_of(triples)
    ]
    for name, value in StepCollator(PAD)(rows_of(triples)).items():
        assert torch.equal(value, StepCollator(PAD)(arrays)[name]), name
