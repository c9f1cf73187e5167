"""Batches of steps: which tokens are compared, which position predicts each, what is left out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenratio.data import PairCollator, StepCollator
from tokenratio.types import PairBatch, StepBatch

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
    collator = StepCollator(PAD, share_prompt="always" if share else "never", prune=prune)
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


def test_the_prompt_is_shared_where_it_saves():
    def is_shared(rows, hidden_size=512):
        return "branch" in StepCollator(PAD, share_prompt="auto", hidden_size=hidden_size)(rows)

    def pair(prompt, response):
        return rows_of([([1] * prompt, [2] * response, [3] * response)])

    assert is_shared(pair(30, 10))
    assert not is_shared(pair(1, 200))
    # A long row's attention costs more than the prompt saves, unless the model is wide.
    assert not is_shared(pair(200, 800))
    assert is_shared(pair(200, 800), hidden_size=4096)
    # One row of 79 and one of 31 against rows of 40 and 33: the padding undoes it.
    uneven = [([1] * 30, [2] * 2, [3] * 2), ([1], [2] * 40, [3] * 40)]
    assert not is_shared(rows_of(uneven))


def test_what_the_reference_said_before_comes_along():
    class Cache:
        def of_steps(self, rows, lengths):
            return {"ref_hidden": torch.full((2 * sum(lengths), 3), float(rows[0]))}

    rows = rows_of([([1], [2, 3], [4, 5, 6]), ([1], [7, 8], [9])])
    assert StepCollator(PAD, cache=Cache())(rows)["ref_hidden"].tolist() == [[10.0] * 3] * 6
    for row in rows:
        for side in ("chosen", "rejected"):
            row[f"{side}_ref_log_probs"] = [-i for i in row[f"{side}_ids"]]
    batch = StepCollator(PAD)(rows)
    assert (batch["ref_log_probs"] == -batch["labels"]).all()
    whole = PairCollator(PAD)(rows)
    assert (whole["ref_log_probs"] == -PairBatch(**whole).labels).all()


def test_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="row 11 has an empty prompt"):
        StepCollator(PAD)(rows_of([([1], [2], [3]), ([], [2], [3])]))


def test_empty_response_is_refused():
    """A pair that shares no step has nothing to compare; `prepare_pairs` names such rows."""
    with pytest.raises(ValueError, match=r"\[10, 11\] has an empty response"):
        StepCollator(PAD)(rows_of([([1], [2], [3]), ([1], [], [3])]))


def test_arrays_are_taken_as_lists_are():
    triples = [([1, 2], [3, 4, 5], [6, 7]), ([1], [8], [9, 9])]
    arrays = [
        {k: v if k == "row" else torch.tensor(v).numpy() for k, v in row.items()}
        for row in rows_of(triples)
    ]
    for name, value in StepCollator(PAD)(rows_of(triples)).items():
        assert torch.equal(value, StepCollator(PAD)(arrays)[name]), name
