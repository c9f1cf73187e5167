"""Every row once an epoch, like lengths together, the same order again after an interruption."""

import json

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader
from transformers import TrainerCallback

from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio import TokenRatioConfig, TokenRatioTrainer
from tokenratio.data import prepare_completions, prepare_pairs
from tokenratio.data.length_grouping import LengthGroupedSampler, row_lengths, token_counts

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=300)


def order_of(sampler, epoch=0):
    sampler.set_epoch(epoch)
    return list(sampler)


def padding_share(lengths, order, batch_size):
    """Padding among all tokens of an epoch's batches."""
    rows = [[lengths[row] for row in batch] for batch in BatchSampler(order, batch_size, False)]
    return 1 - sum(map(sum, rows)) / sum(max(batch) * len(batch) for batch in rows)


# --- lengths --------------------------------------------------------------------------------------


def test_row_lengths(tokenizer):
    rows = [
        {"prompt": "ash bay", "chosen": "cow", "rejected": "dew elm fig"},
        {"prompt": "ash", "chosen": "cow dew elm gum", "rejected": "hay"},
    ]
    prompts = [len(tokenizer.encode(row["prompt"])) for row in rows]
    data = prepare_pairs(rows, tokenizer, max_length=None, max_prompt_length=None).dataset
    sides = [[len(row[side]) for row in data] for side in ("chosen_ids", "rejected_ids")]
    assert sides[0] != sides[1]
    for pruned, pick in ((False, max), (True, min)):
        expected = [p + pick(c, r) for p, c, r in zip(prompts, *sides, strict=True)]
        assert row_lengths(data, pruned=pruned).tolist() == expected
    assert token_counts(data.select([1]))["chosen_ids"].tolist() == sides[0][1:]
    completions = prepare_completions(rows, tokenizer, max_length=None).dataset
    expected = [p + c for p, c in zip(prompts, sides[0], strict=True)]
    assert row_lengths(completions).tolist() == expected


# --- the order ------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True)
@given(LENGTHS, st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**32 - 1), st.integers(0, 9))
def test_every_row_once_and_the_same_again(lengths, batch_size, num_processes, seed, epoch):
    make = lambda: LengthGroupedSampler(  # noqa: E731
        lengths, batch_size, seed=seed, num_processes=num_processes
    )
    sampler = make()
    order = order_of(sampler, epoch)
    assert len(sampler) == len(lengths)
    assert sorted(order) == list(range(len(lengths)))
    assert all(type(row) is int for row in order)  # a numpy integer would index differently
    torch.manual_seed(epoch + 1)
    np.random.seed(epoch)
    order_of(sampler, epoch + 1)
    assert order_of(sampler, epoch) == order_of(make(), epoch) == order


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 400), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_the_first_epoch_begins_with_the_longest(num_rows, batch_size, num_processes, seed):
    lengths = np.random.default_rng(seed).permutation(num_rows)
    sampler = LengthGroupedSampler(lengths, batch_size, seed=seed, num_processes=num_processes)
    assert lengths[order_of(sampler)[0]] == num_rows - 1


def test_epochs_and_seeds_differ():
    lengths = [1 + row % 23 for row in range(200)]
    orders = {
        (seed, epoch): tuple(order_of(LengthGroupedSampler(lengths, 4, seed=seed), epoch))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(set(orders.values())) == 9  # seed 1's first epoch is not seed 0's second either
    batches = [set(map(frozenset, BatchSampler(order, 4, False))) for order in orders.values()]
    assert all(len(a & b) < 10 for a in batches for b in batches if a is not b)  # of 50


def test_neighbours_are_alike_and_training_does_not_run_from_long_to_short():
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 1000, size=8000)
    sampler = LengthGroupedSampler(lengths, 4, seed=0, num_processes=2)
    means = lengths[order_of(sampler, 1)].reshape(-1, 4).mean(1)
    groups = means.reshape(-1, 2)
    # What two processes do at once differs little; what follows in time is anything.
    assert np.abs(groups[:, 0] - groups[:, 1]).mean() < 0.05 * np.abs(np.diff(groups[:, 0])).mean()
    for group in (groups[:-1, 0], groups[:50, 0]):
        lag = np.corrcoef(group[:-1], group[1:])[0, 1]
        assert abs(lag) < 3 / np.sqrt(len(group))
    # The order within the epoch has no trend either.
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 3 / np.sqrt(len(groups))
    # Sorted within chunks, as transformers' sampler leaves them, would be seen.
    in_order = np.concatenate([np.sort(chunk)[::-1] for chunk in groups[:, 0].reshape(20, 50)])
    assert np.corrcoef(in_order[:-1], in_order[1:])[0, 1] > 0.5


def test_the_last_rows_are_of_any_length():
    lengths = list(range(1, 104))
    last = [order_of(LengthGroupedSampler(lengths, 4, seed=seed), 1)[-3:] for seed in range(300)]
    sizes = np.array([[lengths[row] for row in rows] for rows in last])
    assert 42 < sizes.mean() < 62  # the mean is 52
    assert np.ptp(sizes, axis=1).mean() < 15  # alike among themselves: of any three it would be 52


def test_sizes_below_one_are_refused():
    for sizes in ({"batch_size": 0}, {"batch_size": 4, "num_processes": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            LengthGroupedSampler([1, 2], seed=0, **sizes)
    assert list(LengthGroupedSampler([], 4, seed=0)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tldr", "hh_small"])
def test_less_padding_on_real_lengths(name, data_folder, tokenizer):
    data = prepare_pairs(data_folder / name, tokenizer, max_length=None, max_prompt_length=None)
    lengths = row_lengths(data.dataset, pruned=True)
    rng = np.random.default_rng(0)
    shuffled = np.mean([padding_share(lengths, rng.permutation(len(lengths)), 8) for _ in range(5)])
    sampler = LengthGroupedSampler(lengths, 8, seed=0)
    grouped = np.mean([padding_share(lengths, order_of(sampler, epoch), 8) for epoch in range(5)])
    assert grouped < 0.03 < 0.2 < shuffled


# --- under accelerate and in the trainer ----------------------------------------------------------

ROWS, BATCH = 43, 4


def loader_of(sampler, *, processes=1, index=0):
    loader = DataLoader(range(len(sampler)), BATCH, sampler=sampler)
    return prepare_data_loader(
        loader, num_processes=processes, process_index=index, put_on_device=False
    )


def lengths_of(rows):
    return [1 + (7 * row) % 31 for row in range(rows)]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("epoch", [0, 1])
def test_skipping_batches_keeps_the_order(processes, epoch):
    """As in `Trainer`: the loader, then the sampler, are told the epoch before it is iterated."""

    def batches(index, skip):
        sampler = LengthGroupedSampler(lengths_of(ROWS), BATCH, seed=3, num_processes=processes)
        loader = loader_of(sampler, processes=processes, index=index)
        loader = skip_first_batches(loader, skip) if skip else loader
        loader.set_epoch(epoch)
        # Through a skipping loader over several processes accelerate does not reach the sampler.
        sampler.set_epoch(epoch)
        return [batch.tolist() for batch in loader]

    shares = [batches(index, 0) for index in range(processes)]
    assert len({len(share) for share in shares}) == 1
    for skip in (1, 3):
        assert [batches(index, skip) for index in range(processes)] == [s[skip:] for s in shares]
    sampler = LengthGroupedSampler(lengths_of(ROWS), BATCH, seed=3, num_processes=processes)
    order = order_of(sampler, epoch)
    together = [row for step in zip(*shares, strict=True) for batch in step for row in batch]
    # accelerate fills the last step up with the epoch's first rows; all else is as we ordered it.
    assert together[:ROWS] == order
    assert set(together[ROWS:]) <= set(order[: processes * BATCH])


@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_tells_the_epoch(processes):
    sampler = LengthGroupedSampler(lengths_of(40), BATCH, seed=3, num_processes=processes)
    loader = loader_of(sampler, processes=processes)
    epochs = [[batch.tolist() for batch in loader] for _ in range(3)]
    assert sampler.epoch == 2
    for epoch, batches in enumerate(epochs):
        assert batches == list(BatchSampler(order_of(sampler, epoch), BATCH, False))[::processes]


class Cut(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Grouped(TokenRatioTrainer):
    """The hook: `Trainer` asks for its sampler here."""

    rows_seen: list[list[int]]

    def _get_train_sampler(self, train_dataset=None):
        lengths = row_lengths(self.train_data.dataset)
        return LengthGroupedSampler(
            lengths,
            self.args.train_batch_size,
            seed=self.args.seed,
            num_processes=self.args.world_size,
        )

    def training_step(self, model, inputs, *args, **kwargs):
        self.rows_seen.append(inputs["row"].tolist())
        return super().training_step(model, inputs, *args, **kwargs)


def grouped_run(folder, *, cut=None, resume=None):
    args = TokenRatioConfig(
        output_dir=str(folder),
        use_cpu=True,
        disable_tqdm=True,
        max_steps=9,  # of 22 pairs in steps of 2 × 2: 6 an epoch, so the last is in the second
        save_steps=1,
        max_length=32,
        learning_rate=1e-3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        seed=7,
    )
    trainer = Grouped(
        tiny_model(),
        args=args,
        train_dataset=word_pairs(22),
        processing_class=tiny_tokenizer(),
        callbacks=[] if cut is None else [Cut(cut)],
    )
    trainer.rows_seen = []
    if cut is None:
        trainer.train(resume_from_checkpoint=resume)
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_second")
    return trainer, lines


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_order(tmp_path):
    whole, metrics = grouped_run(tmp_path / "whole")
    seen = [row for batch in whole.rows_seen for row in batch]
    assert sorted(seen[:22]) == list(range(22))
    lengths = row_lengths(whole.train_data.dataset)
    for epoch, part in enumerate((seen[:22], seen[22:])):
        order = order_of(LengthGroupedSampler(lengths, 2, seed=7), epoch)
        assert part == order[: len(part)]
    for cut in (2, 6, 8):  # within the first epoch, between the two, within the second
        folder = tmp_path / f"cut-{cut}"
        grouped_run(folder, cut=cut)
        resumed, again = grouped_run(folder, resume=True)
        assert resumed.rows_seen == whole.rows_seen[-len(resumed.rows_seen) :]
        assert again == metrics
        for name, weight in resumed.model.state_dict().items():
            assert torch.equal(weight, whole.model.state_dict()[name])
