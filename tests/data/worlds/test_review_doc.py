"""The tables of docs/review-world.md are the code's; run as a script, this rewrites them."""

import re
import statistics
from dataclasses import asdict
from pathlib import Path

import pytest

from tokenratio.data.worlds import review_lexicon as lexicon
from tokenratio.data.worlds.review_grammar import all_prompts
from tokenratio.data.worlds.reviews import ReviewWorld

DOC = Path(__file__).parents[3] / "docs" / "review-world.md"
WORLD = ReviewWorld()


def _table(*rows):
    header, *body = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([header, "|" + "---|" * len(rows[0]), *body])


def _topics(doc):
    rows = [
        (
            topic,
            *(
                ", ".join(words[topic])
                for words in (lexicon.SUBJECTS, lexicon.ASPECTS, lexicon.PEOPLE)
            ),
        )
        for topic in lexicon.SUBJECTS
    ]
    return _table(("topic", "SUBJECT", "ASPECT", "PERSON"), *rows)


def _words(doc):
    per_topic = ("SUBJECTS", "ASPECTS", "PEOPLE")
    rows = [
        (name.replace("_", " "), ", ".join(f"`{word}`" for word in words if word))
        for name, words in vars(lexicon).items()
        if name.isupper() and isinstance(words, tuple) and name not in per_topic
    ]
    return _table(("class", "words"), *rows)


def _grammar(doc):
    return _table(("probability", "value"), *asdict(WORLD.grammar).items())


def _reward(doc):
    return _table(("constant", "value"), *asdict(WORLD.reward).items())


def _example(doc):
    text = re.search(r'^Example: "(.*)"$', doc, re.MULTILINE)[1]
    rewards = [round(reward, 4) for reward in WORLD.token_rewards(text)]
    total = ("**sum**", f"**{round(WORLD.gold_reward(text), 4)}**")
    return _table(("word", "reward"), *zip(text.split(), rewards, strict=True), total)


def _numbers(doc):
    pairs = WORLD.preference_pairs(4000, seed=11)
    rows = [(pair["prompt"], pair[side]) for pair in pairs for side in ("chosen", "rejected")]
    lengths = [len(WORLD.token_log_probs(*row)) for row in rows]
    rewards = [WORLD.gold_reward(text) for _, text in rows]
    entropy = -sum(WORLD.log_prob(*row) for row in rows) / sum(lengths)
    ratios = [min(pair) / max(pair) for pair in zip(lengths[::2], lengths[1::2], strict=True)]
    agree = statistics.mean(pair["chosen_reward"] > pair["rejected_reward"] for pair in pairs)
    return _table(
        ("quantity", "value"),
        ("vocabulary, special tokens included", len(lexicon.vocabulary())),
        ("prompts (train, test)", f"{len(all_prompts())} (3072, 768)"),
        ("length, mean ± sd", f"{statistics.mean(lengths):.1f} ± {statistics.stdev(lengths):.1f}"),
        ("longest response", max(lengths)),
        ("shorter over longer length of a pair, mean", f"{statistics.mean(ratios):.2f}"),
        (
            "gold reward, mean ± sd",
            f"{statistics.mean(rewards):.2f} ± {statistics.stdev(rewards):.2f}",
        ),
        (
            "responses with an insult",
            f"{statistics.mean(WORLD.has_insult(text) for _, text in rows):.3f}",
        ),
        ("entropy, nats per token", f"{entropy:.3f}"),
        ("labels that agree with the gold reward", f"{agree:.3f}"),
    )


def render(doc):
    """The page with every table regenerated."""
    for name in re.findall(r"<!-- table: (\w+) -->", doc):
        block = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        table = globals()[f"_{name}"](doc)
        doc = re.sub(block, lambda found: f"{found[1]}{table}\n{found[2]}", doc, flags=re.DOTALL)  # noqa: B023
    return doc


@pytest.mark.slow
def test_the_page_says_what_the_code_does():
    doc = DOC.read_text()
    assert len(re.findall("<!-- table:", doc)) == 6
    assert render(doc) == doc


if __name__ == "__main__":
    DOC.write_text(render(DOC.read_text()))
