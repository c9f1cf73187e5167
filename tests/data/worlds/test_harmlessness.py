import json
import math
import sys
import warnings

import pytest

from tokenratio.data.worlds import world_rows
from tokenratio.data.worlds.harmlessness import HarmlessnessWorld, _classifier
from tokenratio.errors import TokenRatioError

WORLD = HarmlessnessWorld()
LONG = "\n\nHuman: Hi there\n\nAssistant: Hello.\n\nHuman: How do I\n\nboil an egg?\n\nAssistant:"
HH = [
    {
        "prompt": LONG,
        "chosen": " In water.",
        "rejected": " No.",
    },
    {"prompt": "\n\nHuman: Who won?\n\nAssistant:", "chosen": " I.", "rejected": " You."},
    {"prompt": "\n\nHuman: Who won?\n\nAssistant:", "chosen": " They.", "rejected": " She."},
]


@pytest.fixture
def hh(tmp_path, monkeypatch):
    """A file of three rows with two different prompts."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hh.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in HH))
    return path


def test_prompts_are_those_of_the_file_as_messages(hh):
    rows = world_rows("world:harmlessness?prompts=2&file=hh.jsonl")
    assert sorted((row["prompt"] for row in rows), key=len) == [
        [{"role": "user", "content": "Who won?"}],
        [
            {"role": "user", "content": "Hi there"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "How do I\n\nboil an egg?"},
        ],
    ]


def test_transcripts_without_columns(hh):
    whole = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in HH]
    hh.write_text("".join(json.dumps(row) + "\n" for row in whole))
    rows = world_rows("world:harmlessness?prompts=2&file=hh.jsonl")
    assert {row["prompt"][-1]["content"] for row in rows} == {
        "Who won?",
        "How do I\n\nboil an egg?",
    }


def test_conversations_and_plain_texts(hh):
    hh.write_text(json.dumps({"prompt": [{"role": "user", "content": "Why?"}]}) + "\n")
    (row,) = world_rows("world:harmlessness?prompts=1&file=hh.jsonl")
    assert row["prompt"] == [{"role": "user", "content": "Why?"}]
    hh.write_text(json.dumps({"prompt": "Why not?"}) + "\n")
    (row,) = world_rows("world:harmlessness?prompts=1&file=hh.jsonl")  # the file as it is now
    assert row["prompt"] == [{"role": "user", "content": "Why not?"}]


def test_an_instruction_that_quotes_a_transcript_keeps_all_its_text(hh):
    text = "Summarise this:\n\nHuman: Hi\n\nAssistant: Hello"
    hh.write_text(json.dumps({"prompt": text}) + "\n")
    (row,) = world_rows("world:harmlessness?prompts=1&file=hh.jsonl")
    assert row["prompt"] == [{"role": "user", "content": text}]


def test_a_folder_has_splits(hh):
    for name, row in (("train", HH[0]), ("test", HH[1])):
        (hh.parent / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    hh.unlink()
    for split, end in (("train", "How do I\n\nboil an egg?"), ("test", "Who won?")):
        (row,) = world_rows(f"world:harmlessness?prompts=1&file=.&split={split}")
        assert row["prompt"][-1]["content"] == end


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("world:harmlessness?prompts=2", "add file=PATH"),
        ("world:harmlessness?prompts=2&file=", "add file=PATH"),
        ("world:harmlessness?prompts=2&file=none.jsonl", "none.jsonl: no such file"),
        ("world:harmlessness?prompts=2&fil=hh.jsonl", "did you mean 'file'"),
        ("world:harmlessness?pairs=2&file=hh.jsonl", "its pairs come from a policy"),
        ("world:sentiment?prompts=2&file=hh.jsonl", "no option of prompts 'file'"),
    ],
)
def test_mistakes_are_named(hh, source, message):
    with pytest.raises(TokenRatioError, match=message):
        world_rows(source)


def test_a_prompt_that_asks_nothing_is_named(hh):
    hh.write_text(json.dumps({"prompt": "\n\nHuman: Hi\n\nAssistant: Hello there"}) + "\n")
    with pytest.raises(TokenRatioError, match=r"hh.jsonl:1.* does not end with a turn of the user"):
        world_rows("world:harmlessness?prompts=1&file=hh.jsonl")


# --- reward ---------------------------------------------------------------------------------------

package = pytest.importorskip("profanity_check", reason="needs the extra worlds")


def test_the_reward_is_the_log_odds_of_a_clean_text():
    text = "You silly fool, leave my garden"
    (prob,) = package.predict_prob([text])
    assert WORLD.gold_reward(text) == pytest.approx(math.log((1 - prob) / prob))
    assert WORLD.gold_reward("What a fine evening") > 2
    assert WORLD.gold_reward("fuck you, you fucking asshole") == -WORLD.scale
    assert HarmlessnessWorld(scale=0.5).gold_reward("What a fine evening") == 0.5
    (profane,) = WORLD.response_measures()
    assert profane.of("fuck you")
    assert not profane.of("thank you")


def test_pairs_from_a_policy(hh):
    rows = world_rows(
        "world:harmlessness?pairs=2&file=hh.jsonl&temperature=0.01",
        sampler=lambda prompts, num: [["shut up, you shit", "thank you"] for _ in prompts],
    )
    assert [row["chosen"][0]["content"] for row in rows] == ["thank you", "thank you"]


def test_a_missing_package_is_one_line(monkeypatch, hh):
    _classifier.cache_clear()
    monkeypatch.setitem(sys.modules, "profanity_check", None)
    try:
        with pytest.raises(
            TokenRatioError, match=r"alt-profanity-check: pip install 'tokenratio\["
        ):
            world_rows("world:harmlessness?pairs=1&file=hh.jsonl", sampler=pytest.fail)
    finally:
        _classifier.cache_clear()


def test_another_scikit_learn_is_refused(monkeypatch):
    from sklearn.exceptions import InconsistentVersionWarning

    class Old:
        def __getattr__(self, name):
            warnings.warn(
                InconsistentVersionWarning(
                    estimator_name="x", current_sklearn_version="2", original_sklearn_version="1"
                ),
                stacklevel=1,
            )
            raise AttributeError(name)

    _classifier.cache_clear()
    monkeypatch.setitem(sys.modules, "profanity_check", Old())
    try:
        with pytest.raises(TokenRatioError, match="goes with your scikit-learn"):
            WORLD.require()
    finally:
        _classifier.cache_clear()
