"""Judging into a file: both orders, resumed, killed, and no verdict paid for twice."""

import json
import math
import sys
import textwrap
from contextlib import closing

import pytest

from evaluation.loopback import KEY, Loopback, run_and_kill
from evaluation.response_pairs import pair_of
from tiny import word_pairs
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.budget import Budget
from tokenratio.evaluation.endpoint import Endpoint, EndpointSettings
from tokenratio.evaluation.journal import read_settings
from tokenratio.evaluation.json_lines import parse_lines
from tokenratio.evaluation.judges.cache import VerdictCache
from tokenratio.evaluation.judges.gold import GoldJudge
from tokenratio.evaluation.judges.llm import LLMJudge
from tokenratio.evaluation.judges.protocol import ResponsePair, Verdict
from tokenratio.evaluation.response_files import AnsweredPrompt
from tokenratio.evaluation.verdict_files import (
    Judgement,
    describe_judgements,
    judge_all,
    pair_up,
    read_judgements,
)
from tokenratio.models.response import Response


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def comparisons_of(num):
    pairs = enumerate(word_pairs(num))
    return [pair_of(f"c:{i}", 0, p["prompt"], p["chosen"], p["rejected"]) for i, p in pairs]


class Scripted:
    """Says what it is told by (id, whether A stands first), and remembers what it was asked."""

    order_matters = True

    def __init__(self, verdicts, originals, stop_after=None):
        self.verdicts, self.asked, self.stop_after = verdicts, [], stop_after
        self.firsts = {(c.id, c.response_a.text) for c in originals}

    def identity(self):
        return {"judge": "scripted"}

    def __call__(self, comparisons):
        for number, comparison in enumerate(comparisons):
            if number == self.stop_after:
                raise TokenRatioError("the judge is tired")
            is_first = (comparison.id, comparison.response_a.text) in self.firsts
            self.asked.append((comparison.id, is_first))
            said = self.verdicts.get((comparison.id, is_first), 1.0 if is_first else 0.0)
            yield said if isinstance(said, Verdict) else Verdict(said)


def judged(path, judge, comparisons, settings=None):
    said = []
    return judge_all(comparisons, judge, path, settings, report=said.append), said


def test_both_orders_are_asked_averaged_and_compared(tmp_path):
    comparisons = comparisons_of(6)
    no_verdict = Verdict(None, "mumbles")
    judge = Scripted(
        {
            ("c:0", True): 0.9,  # A either way
            ("c:0", False): 0.3,
            ("c:1", True): 1.0,  # whoever is first
            ("c:1", False): 1.0,
            ("c:2", True): 0.0,  # whoever is second
            ("c:2", False): 0.0,
            ("c:3", True): 0.5,  # a tie is no preference that could flip
            ("c:3", False): 1.0,
            ("c:4", True): no_verdict,
            ("c:4", False): 0.0,
            ("c:5", True): no_verdict,
            ("c:5", False): no_verdict,
        },
        comparisons,
    )
    path = tmp_path / "j.jsonl"
    judgements, said = judged(path, judge, comparisons, {"ours": "a", "theirs": "b"})
    assert judge.asked == [(f"c:{i}", first) for i in range(6) for first in (True, False)]
    told = [
        (j.prob_a_first, j.prob_a_second, j.probability, j.flipped, j.unparsed) for j in judgements
    ]
    assert told == [
        (0.9, 0.7, pytest.approx(0.8), False, 0),
        (1.0, 0.0, 0.5, True, 0),
        (0.0, 1.0, 0.5, True, 0),
        (0.5, 0.0, 0.25, False, 0),
        (None, 1.0, None, None, 1),
        (None, None, None, None, 2),
    ]
    assert said == [
        "6 comparisons, 2 without a full verdict (mumbles: 3); the position decided 2 of 4"
    ]
    assert describe_judgements(judgements) == said[0]
    assert read_judgements(path) == judgements
    first, line = comparisons[0], json.loads(path.read_text(encoding="utf-8").split("\n")[0])
    lengths = [len(first.response_a.text), len(first.response_b.text)]
    assert [line["characters_a"], line["characters_b"]] == lengths
    words = [len(first.response_a.text.split(" ")), len(first.response_b.text.split(" "))]
    assert [line["words_a"], line["words_b"]] == words
    (settings,) = read_settings(path).values()
    assert settings == {"judge": "scripted", "ours": "a", "theirs": "b"}


def test_where_the_order_cannot_matter_one_is_asked(tmp_path):
    asked = []

    def reward(text):
        asked.append(text)
        return math.nan if text == "nan" else len(text)

    comparisons = [pair_of("x", 0, "p", "aa", "a"), pair_of("y", 0, "p", "nan", "a")]
    (first, second), _ = judged(tmp_path / "j.jsonl", GoldJudge(reward, "length"), comparisons)
    assert len(asked) == 4
    assert (first.prob_a_first, first.prob_a_second, first.probability) == (1.0, 1.0, 1.0)
    assert first.flipped is False
    assert (second.probability, second.unparsed, second.reasons) == (None, 1, ("a reward is nan",))


def test_generations_are_paired_by_prompt_and_sample():
    def side(*texts, prompt="p", id="x"):
        samples = tuple(Response(text, "eos", (1,)) for text in texts)
        return AnsweredPrompt(id, prompt, samples, "s")

    two = pair_up([side("a", "b")], [side("c", "d")])
    assert two == [
        ResponsePair("x", 0, "p", Response("a", "eos", (1,)), Response("c", "eos", (1,))),
        ResponsePair("x", 1, "p", Response("b", "eos", (1,)), Response("d", "eos", (1,))),
    ]
    one = pair_up([side("a", "b")], [side("c")])
    assert [(c.sample, c.response_a.text, c.response_b.text) for c in one] == [
        (0, "a", "c"),
        (1, "b", "c"),
    ]
    other = pair_up([side("c")], [side("a", "b")])
    assert [(c.sample, c.response_a.text, c.response_b.text) for c in other] == [
        (0, "c", "a"),
        (1, "c", "b"),
    ]
    mixed = pair_up([side("a"), side("b", id="y")], [side("c", id="y"), side("d")])
    assert [(c.id, c.response_a.text, c.response_b.text) for c in mixed] == [
        ("x", "a", "d"),
        ("y", "b", "c"),
    ]
    for ours, theirs, said in (
        ([side("a")], [side("b", id="y")], "2 of the prompts are answered on one side only"),
        ([side("a")], [side("b"), side("b", id="y")], "1 of the prompts .* first y"),
        ([side("a")], [side("b", prompt="q")], "different prompts under id x"),
        ([side("a", "b", "c")], [side("b", "c")], "x: 3 samples against 2"),
    ):
        with pytest.raises(TokenRatioError, match=said):
            pair_up(ours, theirs)


def test_a_file_cut_off_is_gone_on_with(tmp_path):
    path, comparisons = tmp_path / "j.jsonl", comparisons_of(5)
    first, _ = judged(path, Scripted({}, comparisons), comparisons)
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == 10]
    for cut in (0, 1, ends[1] - 1, ends[1], ends[1] + 1, ends[3] + 40, len(whole) - 1, len(whole)):
        path.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends)
        judge = Scripted({}, comparisons)
        again, said = judged(path, judge, comparisons)
        assert again == first
        assert path.read_bytes() == whole
        assert {id for id, _ in judge.asked} == {f"c:{i}" for i in range(kept, 5)}
        assert len(judge.asked) == 2 * (5 - kept)
        assert any("cut off" in text for text in said) == (cut not in (0, *ends))


def test_a_judge_that_gives_up_or_cannot_be_asked_loses_nothing(tmp_path):
    path, comparisons = tmp_path / "j.jsonl", comparisons_of(5)
    with pytest.raises(TokenRatioError, match=r"is tired\. .*has 2 of 5 comparisons judged"):
        judged(path, Scripted({}, comparisons, stop_after=5), comparisons)
    busy = {("c:3", False): Verdict(None, "busy", is_final=False)}
    with pytest.raises(
        TokenRatioError, match=r"1 comparisons could not be judged, first c:3.*busy"
    ):
        judged(path, Scripted(busy, comparisons), comparisons)
    judge = Scripted({}, comparisons)
    judgements, _ = judged(path, judge, comparisons)
    assert judge.asked == [("c:3", True), ("c:3", False)]
    assert [judgement.id for judgement in judgements] == [f"c:{i}" for i in range(5)]
    assert read_judgements(path) == judgements


def test_another_judging_is_refused_in_words(tmp_path):
    path, comparisons = tmp_path / "j.jsonl", comparisons_of(3)
    judged(path, Scripted({}, comparisons), comparisons, {"ours": "a"})
    before = path.read_bytes()
    changed = [*comparisons[:2], pair_of("c:2", 0, "p", "other", "texts")]
    for judge, given, settings, said in (
        (Scripted({}, comparisons), comparisons, {"ours": "b"}, r"other settings \(ours 'a', now"),
        (GoldJudge(len, "length"), comparisons, {"ours": "a"}, "judge 'scripted', now 'gold'"),
        (Scripted({}, comparisons), changed, {"ours": "a"}, "j.jsonl:3: c:2, sample 0 has"),
        (
            Scripted({}, comparisons),
            comparisons[:2],
            {"ours": "a"},
            "j.jsonl:3: c:2, sample 0 is not among",
        ),
        (Scripted({}, comparisons), [comparisons[0]] * 2, {"ours": "a"}, "two comparisons have"),
        (Scripted({}, comparisons), [], {"ours": "a"}, "nothing to compare"),
    ):
        with pytest.raises(TokenRatioError, match=said):
            judged(path, judge, given, settings)
        assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prob_a_first": 1.5}, r"j\.jsonl:1: prob_a_first is 1.5, not a probability"),
        ({"prob_a_second": "A"}, r"j\.jsonl:1: prob_a_second is 'A', not a number or null"),
        ({"reasons": 3}, r"j\.jsonl:1: reasons is 3, not a list"),
        ({"id": ["a"]}, r"j\.jsonl:1: id is a list, not a string"),
        (None, r"j\.jsonl:1: no field 'content'; this is not a file of judgements"),
    ],
)
def test_damage_is_named(tmp_path, change, said):
    path, comparisons = tmp_path / "j.jsonl", comparisons_of(1)
    judged(path, Scripted({}, comparisons), comparisons)
    line = json.loads(path.read_bytes())
    if change is None:
        del line["content"]
    path.write_text(json.dumps(line | (change or {})) + "\n", encoding="utf-8")
    with pytest.raises(TokenRatioError, match=said):
        read_judgements(path)


# over HTTP


def shown(question):
    parts = question.split(" -----\n")
    return parts[2].partition("\n-----")[0], parts[3].partition("\n-----")[0]


def longer(question, _):
    first, second = map(len, shown(question))
    return "It is longer.\n" + ("[[A]]" if first > second else "[[B]]" if second > first else "?")


def llm(url, cache, *, budget=None, report=lambda text: None, **overrides):
    quick = {"concurrency": 4, "timeout": 5.0, "backoff": 0.001, "max_backoff": 0.01}
    endpoint = Endpoint(
        EndpointSettings(url, "tiny", **quick | overrides), budget=budget, report=report
    )
    return LLMJudge(endpoint, "hh-helpful", VerdictCache(cache))


def wanted(comparison):
    a, b = len(comparison.response_a.text), len(comparison.response_b.text)
    return None if a == b else float(a > b)


@pytest.mark.slow
def test_a_rough_endpoint_judges_everything_once(tmp_path):
    """429, 500, hanging, resets and broken JSON on the way; garbled verdicts stay without one."""
    comparisons = comparisons_of(12)
    faults = [(429, {"Retry-After": "0.05"}, None), 500, "reset", "garbled", "hang"]
    number = {c.response_a.text: i for i, c in enumerate(comparisons)}

    def fault(question, times):
        kind = number.get(shown(question)[0], 0) % 6
        return faults[times] if times < kind else None

    def reply(question, _):
        if number.get(shown(question)[0]) == 3:  # in one order only
            return "I like both. [[A]] or [[B]]"
        return longer(question, _)

    path = tmp_path / "j.jsonl"
    with Loopback(reply, fault=fault) as server:
        judge = llm(server.url, tmp_path / "v.sqlite", timeout=0.4)
        judgements, said = judged(path, judge, comparisons)
        for j, comparison in zip(judgements, comparisons, strict=True):
            assert j.probability == (None if j.id == "c:3" else wanted(comparison))
        odd = judgements[3]
        assert (odd.prob_a_first, odd.prob_a_second) == (None, wanted(comparisons[3]))
        assert "more than one verdict in the answer" in odd.reasons
        assert "more than one verdict in the answer: 1" in said[-1]
        assert set(server.answered.values()) == {1}
        assert server.answered.total() == 24
        asked = server.asked.copy()
        # another run over the same, in another file: not a request
        again, _ = judged(tmp_path / "k.jsonl", judge, comparisons)
        assert again == judgements
        assert server.asked == asked


def test_kept_answers_are_read_again_and_not_paid_again(tmp_path, monkeypatch):
    """What an older version could not read, in the cache and in an unfinished or finished file."""
    comparisons, path = comparisons_of(8), tmp_path / "j.jsonl"
    dressed = ["<think>\n[[A]] or [[B]]?\n</think>\n{}", "**{}**", "Final verdict: {}."]

    number = {
        frozenset((c.response_a.text, c.response_b.text)): i for i, c in enumerate(comparisons)
    }

    def reply(question, _):
        kind = number[frozenset(shown(question))] % 4
        verdict = longer(question, _).rpartition("\n")[2]
        return "Torn: [[A]].\n[[B]]" if kind == 3 else dressed[kind].format(verdict)

    def strict(answer, finish_reason, verdicts):  # as it was
        known = dict(verdicts)
        found = known.get(answer)
        return Verdict(found, None if found is not None else "no verdict", raw=answer)

    expected = [None if i % 4 == 3 else wanted(c) for i, c in enumerate(comparisons)]
    assert set(expected) == {None, 0.0, 1.0}
    with Loopback(reply) as server:
        with monkeypatch.context() as older:
            older.setattr("tokenratio.evaluation.judges.llm.parse_verdict", strict)
            first, _ = judged(path, llm(server.url, tmp_path / "v"), comparisons)
            assert all(judgement.probability is None for judgement in first)
        asked = server.asked.copy()
        whole = path.read_bytes()
        for lines in (8, 3):  # cut off in the middle, too
            path.write_bytes(b"".join(whole.splitlines(keepends=True)[:lines]))
            judgements, said = judged(path, llm(server.url, tmp_path / "v"), comparisons)
            assert [j.probability for j in judgements] == expected
            assert read_judgements(path) == judgements
            num = sum(value is not None for value in expected[:lines])
            assert f"{num} missing verdicts were read from stored answers" in said[1]
        again, said = judged(path, llm(server.url, tmp_path / "v"), comparisons)
        assert again == judgements
        assert not any("stored answers" in line for line in said)
        assert server.asked == asked


def test_the_budget_stops_in_words_and_keeps_everything(tmp_path):
    comparisons, path, said = comparisons_of(10), tmp_path / "j.jsonl", []
    with Loopback(longer) as server:
        judge = llm(server.url, tmp_path / "v", budget=Budget(max_requests=7), report=said.append)
        with pytest.raises(TokenRatioError, match=r"max_requests: 7 .*\. .* of 10 comparisons"):
            judged(path, judge, comparisons)
        assert "20 requests to tiny" in said[0]
        assert server.asked.total() == 7
        with closing(VerdictCache(tmp_path / "v")) as cache:
            assert len(cache) == 7
        judgements, _ = judged(path, llm(server.url, tmp_path / "v"), comparisons)
        assert server.asked.total() == 20
        assert set(server.asked.values()) == {1}
    assert [j.probability for j in judgements] == [wanted(c) for c in comparisons]


SCRIPT = """
    import sys
    from tiny import word_pairs
    from tokenratio.evaluation.endpoint import Endpoint, EndpointSettings
    from evaluation.response_pairs import pair_of
    from tokenratio.evaluation.judges.cache import VerdictCache
    from tokenratio.evaluation.judges.llm import LLMJudge
    from tokenratio.evaluation.verdict_files import judge_all

    url, cache, path = sys.argv[1:]
    pairs = enumerate(word_pairs(40))
    comparisons = [
        pair_of(f"c:{i}", 0, p["prompt"], p["chosen"], p["rejected"]) for i, p in pairs
    ]
    endpoint = Endpoint(EndpointSettings(url, "tiny", concurrency=4, backoff=0.001))
    judge_all(comparisons, LLMJudge(endpoint, "hh-helpful", VerdictCache(cache)), path)
"""


@pytest.mark.slow
def test_killed_in_the_middle_and_resumed_nothing_is_paid_twice(tmp_path):
    """But what was under way when the process died."""
    path, cache = tmp_path / "j.jsonl", tmp_path / "v.sqlite"
    code = f"import sys; sys.path[:0] = {sys.path!r}\n" + textwrap.dedent(SCRIPT)
    command = [sys.executable, "-c", code]
    comparisons = comparisons_of(40)
    with Loopback(longer, delay=0.01) as server:
        asking = [*command, server.url, str(cache), str(path)]
        answered = run_and_kill(asking, server, answers=30)
        lines, _ = parse_lines(path.read_bytes(), path)
        assert 30 <= answered < 80
        with closing(VerdictCache(cache)) as kept:
            assert answered - 4 <= len(kept) <= answered
        assert 0 < len(lines) <= answered // 2
        judgements, said = judged(path, llm(server.url, cache), comparisons)
    assert f"{len(lines)} of 40 comparisons are already judged" in said[0]
    assert [j.probability for j in judgements] == [wanted(c) for c in comparisons]
    assert read_judgements(path) == judgements
    assert isinstance(judgements[0], Judgement)
    assert len(server.asked) == 80
    assert max(server.asked.values()) <= 2
    assert sum(count == 2 for count in server.asked.values()) <= 4
