"""Batches: response token t of both sides at one index, whatever the lengths."""

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenratio.data import (
    CompletionCollator,
    PairCollator,
    padding_id,
    prepare_completions,
    prepare_pairs,
)
from tokenratio.errors import TokenRatioError
from tokenratio.types import CompletionBatch, PairBatch

PAD = 0
# The pad id occurs among the tokens too: masks must not be guessed from it.
tokens = st.lists(st.integers(0, 9), min_size=1, max_size=7)
pairs = st.lists(st.tuples(tokens, tokens, tokens), min_size=1, max_size=4)


def rows_of(triples):
    return [
        {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r, "row": 10 + i, "origin": f"a:{i}"}
        for i, (p, c, r) in enumerate(triples)
    ]


@given(triples=pairs, multiple=st.sampled_from([None, 1, 8]))
@settings(deadline=None, derandomize=True)
def test_pairs_are_aligned(triples, multiple):
    collated = PairCollator(PAD, multiple)(rows_of(triples))
    assert list(collated) == ["row", "input_ids", "attention_mask", "completion_mask"]
    batch = PairBatch(**collated)
    prompts, chosen, rejected = ([triple[i] for triple in triples] for i in range(3))
    responses = [*chosen, *rejected]
    wholes = [
        prompt + response for prompt, response in zip([*prompts, *prompts], responses, strict=True)
    ]

    assert batch.row.tolist() == [10 + i for i in range(len(triples))]
    assert batch.labels.tolist() == [*chain(*responses)]
    longest = max(map(len, wholes))
    assert batch.input_ids.shape[1] == (-(-longest // multiple) * multiple if multiple else longest)
    for ids, mask, whole in zip(batch.input_ids, batch.attention_mask, wholes, strict=True):
        assert ids[: len(whole)].tolist() == whole
        assert (ids[len(whole) :] == PAD).all()
        assert mask.tolist() == [1] * len(whole) + [0] * (len(ids) - len(whole))

    aligned = batch.align(batch.labels.float())
    for steps, response in zip(aligned, responses, strict=True):
        assert steps[: len(response)].tolist() == response
        assert (steps[len(response) :] == 0).all()
    shorter = [min(len(c), len(r)) for c, r in zip(chosen, rejected, strict=True)]
    assert batch.pair_mask.sum(1).tolist() == shorter
    # Token t stands at one index on both sides of a pair.
    left, right = batch.split(batch.completion_mask)
    assert torch.equal(left.int().argmax(1), right.int().argmax(1))
    # The state that predicts a response's first token is the prompt's last.
    assert batch.states.int().argmax(1).tolist() == [len(p) - 1 for p in [*prompts, *prompts]]
    assert batch.states.sum() == batch.completion_mask.sum()


@given(triples=pairs)
@settings(deadline=None, derandomize=True)
def test_swapping_the_sides_swaps_the_halves(triples):
    collate = PairCollator(PAD)
    straight = collate(rows_of(triples))
    swapped = collate(rows_of([(p, r, c) for p, c, r in triples]))
    for name in ("input_ids", "attention_mask", "completion_mask"):
        halves = straight[name].chunk(2)
        assert torch.equal(torch.cat(halves[::-1]), swapped[name])
    assert torch.equal(straight["row"], swapped["row"])


def test_the_datasets_own_rows(make_tokenizer):
    tokenizer = make_tokenizer("words")
    data = [
        {"prompt": "the sky is", "chosen": "so blue", "rejected": "bad"},
        {"prompt": "a", "chosen": "b", "rejected": "c d e"},
    ]
    pairs = prepare_pairs(data, tokenizer, max_length=None, max_prompt_length=None).dataset
    batch = PairBatch(**PairCollator(padding_id(tokenizer))([pairs[1], pairs[0]]))
    assert batch.row.tolist() == [1, 0]
    assert tokenizer.convert_ids_to_tokens(batch.labels.tolist()) == (
        ["b", "</s>", "so", "blue", "</s>", "c", "d", "e", "</s>", "bad", "</s>"]
    )
    assert batch.input_ids.dtype == torch.int64

    completions = prepare_completions(data, tokenizer, max_length=None).dataset
    batch = CompletionBatch(**CompletionCollator(padding_id(tokenizer), 4)(list(completions)))
    assert batch.input_ids.shape == (2, 8)
    assert batch.row.tolist() == [0, 1]
    assert tokenizer.convert_ids_to_tokens(batch.labels.tolist()) == [
        "so",
        "blue",
        "</s>",
        "b",
        "</s>",
    ]


def test_a_row_without_prompt_is_refused():
    with pytest.raises(ValueError, match="row 10 has an empty prompt"):
        PairCollator(PAD)(rows_of([([], [1], [2])]))


def test_padding_id(make_tokenizer):
    tokenizer = make_tokenizer()
    assert padding_id(tokenizer) == tokenizer.pad_token_id
    bare = make_tokenizer(pad_token=None)
    assert padding_id(bare) == bare.eos_token_id
    assert bare.pad_token is None
    bare.eos_token = None
    with pytest.raises(TokenRatioError, match="neither a pad nor an EOS"):
        padding_id(bare)
