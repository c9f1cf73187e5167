import pytest

from tokenratio.data.worlds import WORLDS, is_world_source, world_rows
from tokenratio.errors import TokenRatioError


def test_is_world_source():
    assert is_world_source("world:reviews?pairs=3")
    assert not is_world_source("worlds/train.jsonl")


def test_rows_are_those_of_the_world():
    world = WORLDS["reviews"]
    assert world_rows("world:reviews?corpus=7&seed=2") == world.sft_corpus(7, seed=2)
    assert world_rows("world:reviews?pairs=7") == world.preference_pairs(7, seed=0)
    assert world_rows(
        "world:reviews?pairs=7&seed=1&flip_rate=0.5&temperature=2&split=test"
    ) == world.preference_pairs(7, seed=1, flip_rate=0.5, temperature=2.0, split="test")
    assert world_rows("world:reviews?prompts=2&split=test") == [
        {"prompt": prompt} for prompt in world.prompts(2, seed=0, split="test")
    ]


def test_a_sampler_supplies_the_responses():
    rows = world_rows(
        "world:reviews?pairs=3", sampler=lambda prompts, _: [["good", "bad"]] * len(prompts)
    )
    assert all({row["chosen"], row["rejected"]} == {"good", "bad"} for row in rows)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("world:review?pairs=2", "no world 'review'; did you mean 'reviews'"),
        ("world:reviews?pair=2", "no option 'pair'; did you mean 'pairs'"),
        ("world:reviews?pairs=2&sed=1", "no option of pairs 'sed'; did you mean 'seed'"),
        ("world:reviews?corpus=2&flip_rate=0.1", "no option of corpus 'flip_rate'"),
        ("world:reviews?pairs=many", "pairs must be a whole number, not 'many'"),
        ("world:reviews?pairs=2&temperature=", "temperature must be a number, not ''"),
        ("world:reviews?pairs=0", "pairs must be at least 1"),
        ("world:reviews?pairs=2&pairs=3", "duplicate option"),
        ("world:reviews?pairs=2&corpus=3", "exactly one of pairs, corpus, prompts"),
        ("world:reviews", "exactly one of pairs, corpus, prompts"),
        ("world:reviews?pairs=2&split=tst", "no split 'tst'"),
    ],
)
def test_mistakes_are_named(source, message):
    with pytest.raises(TokenRatioError, match=message):
        world_rows(source)
