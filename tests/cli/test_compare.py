"""`compare` on files of measures: who is better, whether it is worded with care, exit codes."""

import json
import random
from pathlib import Path

import pytest

from tokenratio.cli.main import main
from tokenratio.evaluation.paired_comparison import PolicyValues, holm_p_values, paired_comparison
from tokenratio.evaluation.results import Measure, PolicyMeasures, measure_of

NUM = 30
# By measure: unit and better direction.
KINDS = {"gold_reward": ("", "higher"), "insults": ("share", "lower"), "length": ("words", None)}
QUICK = ["--num_resamples", "2000"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, *, shift=None, noise=0.1, seed=0, num=NUM, kinds=KINDS, **more):
    """Measures of a policy: what every policy shares by prompt, a shift, and noise of its own."""
    own = random.Random(f"{name} {seed}")
    measures = []
    for kind in kinds:
        shared = random.Random(kind)
        values = [
            (f"p:{i}", 0, shared.gauss(0, 1) + (shift or {}).get(kind, 0) + own.gauss(0, noise))
            for i in range(num)
        ]
        unit, better = KINDS[kind]
        measures.append(measure_of(kind, values, unit=unit, better=better))
    measures += [Measure("credit", 0.5, 0.1, 9, "", "higher")]
    more = {"policy": name.partition("-")[0], "group": "dpo", "settings": {}, **more}
    PolicyMeasures(**more, measures=tuple(measures)).save(Path(name))
    return {measure.name: measure for measure in measures}


def compare(capsys, *argv, code=0):
    found = main(["compare", *map(str, argv), *QUICK])
    printed = capsys.readouterr()
    assert found == code, printed.err or printed.out
    if code == 2:
        assert printed.err.count("\n") == 1
        assert printed.err.startswith("tokenratio: ")
        return printed.err
    assert printed.err == ""
    return printed.out


def figures(path="out.json"):
    return json.loads(Path(path).read_text())


def test_who_wins_is_said_by_the_better_direction(capsys):
    write("good", shift={"gold_reward": 1, "insults": -0.5, "length": 3})
    write("bad")
    lines = compare(capsys, "good", "bad").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["gold_reward", "insults"]
    assert lines[0].startswith("gold_reward: good wins by ")
    assert lines[1].startswith("insults: good wins by 49.8 ± ")  # what it has less of, in points
    assert "after Holm over 2 comparisons" in lines[0]
    assert "n = 30 prompts would need ≥" in lines[0]
    assert " points (95 % interval " in lines[1]
    assert "  " not in lines[0]  # it has no unit
    assert compare(capsys, "bad", "good").startswith("gold_reward: good wins by ")


def test_swapping_negates_and_no_more(capsys):
    write("a", shift={"gold_reward": 0.05})
    write("b")
    compare(capsys, "a", "b", "--output", "ab.json")
    compare(capsys, "b", "a", "--output", "ba.json")
    for one, other in zip(figures("ab.json"), figures("ba.json"), strict=True):
        assert one["difference"] == -other["difference"]
        assert one["interval"] == [-end for end in other["interval"][::-1]]
        for name in ("p_value", "adjusted_p", "standard_error", "significant", "num_prompts"):
            assert one[name] == other[name], name
        assert (one["name_a"], one["name_b"]) == (other["name_b"], other["name_a"])


def test_a_policy_does_not_differ_from_itself(capsys):
    write("a")
    for line in compare(capsys, "one=a", "two=a").splitlines():
        assert "no difference seen between one and two: 0.0 ± 0.0" in line


def test_no_difference_is_no_win(capsys):
    write("a", noise=1.0)
    write("b", noise=1.0)
    printed = compare(capsys, "a", "b", "--measures", "[gold_reward]")
    assert printed.startswith("gold_reward: no difference seen between a and b: ")
    assert "would need ≥" in printed
    assert "Holm" not in printed
    assert "wins" not in printed


def test_figures_are_those_of_the_paired_comparison(capsys):
    a = write("a", shift={"gold_reward": 0.05})
    b = write("b")
    compare(capsys, "a", "b", "--output", "out.json", "--seed", "7")
    sides = [
        PolicyValues(name, [v for *_, v in m.values], [p for p, *_ in m.values])
        for name, m in (("a", a["gold_reward"]), ("b", b["gold_reward"]))
    ]
    expected = paired_comparison(*sides, num_resamples=2000, seed=7)
    found = figures()[0]
    assert found["measure"] == "gold_reward"
    assert found["difference"] == expected.difference
    assert found["difference"] == pytest.approx(a["gold_reward"].mean - b["gold_reward"].mean)
    assert (found["p_value"], found["interval"]) == (expected.p_value, [*expected.interval])
    assert (found["num_prompts"], found["num_seeds"], found["num_unpaired"]) == (NUM, 1, 0)


def test_holm_is_over_all_comparisons_made(capsys):
    write("a", shift={"gold_reward": 0.07})
    write("b")
    write("c")
    for more, num in (([], 4), (["--all_pairs"], 6), (["--measures", "[insults]"], 2)):
        printed = compare(capsys, "a", "b", "c", "--output", "out.json", *more)
        found = figures()
        assert len(found) == printed.count("\n") == num
        assert printed.count(f"after Holm over {num} comparisons") == num
        adjusted = holm_p_values([each["p_value"] for each in found])
        assert [each["adjusted_p"] for each in found] == adjusted
        assert [each["significant"] for each in found] == [p < 0.05 for p in adjusted]
    compare(capsys, "a", "b", "c", "--output", "out.json", "--all_pairs")
    assert [(each["name_a"], each["name_b"]) for each in figures()][:3] == [
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
    ]


def test_exit_codes(capsys):
    write("good", shift={"gold_reward": 1, "insults": -0.5})
    write("bad")
    write("same", shift={"gold_reward": 1})
    for argv, code in (
        (["good", "bad", "--require", "gold_reward"], 0),
        (["good", "bad", "--require", "insults"], 0),
        (["bad", "good", "--require", "gold_reward"], 1),
        (["bad", "good", "--require", "insults"], 1),
        (["good", "same", "--require", "gold_reward", "--measures", "[gold_reward]"], 1),
        (["same", "good", "--require", "gold_reward", "--measures", "[gold_reward]"], 1),
        (["good", "same", "bad", "--require", "gold_reward"], 1),
        (["good", "same", "bad", "--require", "insults"], 0),
        # that a later one loses against another is not asked
        (["good", "same", "bad", "--require", "insults", "--all_pairs"], 0),
        (["bad", "good"], 0),
    ):
        compare(capsys, *argv, code=code)
    printed = compare(capsys, "good", "bad", "--require", "insults", "--measures", "[gold_reward]")
    assert printed.count("\n") == 2


def test_seeds_are_paired_and_each_counts(capsys):
    for seed in range(3):
        write(f"a-{seed}", shift={"gold_reward": 1 + seed}, seed=seed)
        write(f"b-{seed}", shift={"gold_reward": seed}, seed=seed)
    seeds = [f"{name}={','.join(f'{name}-{i}' for i in range(3))}" for name in "ab"]
    printed = compare(capsys, *seeds, "--output", "out.json")
    assert "gold_reward: a wins by 1.0" in printed
    assert "30 prompts and 3 seeds" in printed
    assert figures()[0]["num_seeds"] == 3
    # unpaired, the seeds' differences do not cancel
    other = "b=b-1,b-2,b-0"
    compare(capsys, seeds[0], other, "--output", "other.json")
    assert figures("other.json")[0]["standard_error"] > 5 * figures()[0]["standard_error"]
    assert "were not run with the same seeds" in compare(capsys, seeds[0], "b=b-0,b-1", code=2)
    assert "were not run with the same seeds" in compare(capsys, seeds[0], "b-0", code=2)


def test_prompts_that_one_lacks_are_counted(capsys):
    write("a")
    write("b", num=NUM - 4)
    assert "4 prompts left out that only one policy answered" in compare(capsys, "a", "b")
    write("one", num=1)
    assert "share 1 of 30 prompts" in compare(capsys, "a", "one", code=2)


def test_only_measures_that_all_have_are_compared_by_default(capsys):
    write("a")
    write("b", kinds=["insults", "length"])
    assert compare(capsys, "a", "b").startswith("insults")
    assert compare(capsys, "a", "b").count("\n") == 1
    printed = compare(capsys, "a", "b", "--measures", "[length]")
    assert printed.startswith("length: no difference")


def test_evaluations_that_differ(capsys):
    write("a", settings={"prompts": "p.jsonl", "temperature": 1.0, "path": "x"})
    write("b", settings={"prompts": "p.jsonl", "temperature": 0.7, "path": "y"})
    printed = compare(capsys, "a", "b").splitlines()
    assert printed[0] == "note: the evaluations differ in temperature: 1.0, 0.7"
    assert len(printed) == 3
    write("b", settings={"prompts": "/tmp/p.jsonl", "temperature": 1.0})
    assert compare(capsys, "a", "b").startswith("note: the evaluations differ in prompts: ")
    argv = ["compare", "a", "b", "--require", "gold_reward"]
    assert main(argv) == 2
    assert "--require needs evaluations with the same settings" in capsys.readouterr().err


def test_ids_that_stand_for_other_prompts_are_not_paired(capsys):
    """A world's prompts are numbered: those of another seed go by the same ids."""
    write("a", contents={"p:0": "aa", "p:1": "bb"})
    write("b", contents={"p:1": "bb", "p:2": "cc"})
    compare(capsys, "a", "b")
    write("b", contents={"p:0": "aa", "p:1": "cc"})
    assert "different data: p:1 differs in b" in compare(capsys, "a", "b", code=2)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "needs two or more policies"),
        (["a"], "needs two or more policies"),
        (["a", "a"], "two policies have the name"),
        (["x=a", "x=b"], "two policies have the name"),
        (["a", "none"], "none cannot be read (No such file"),
        (["a", "notes"], "notes/measures.json: it is a list, not an object; this is not a file of"),
        (["a", "b", "--measures", "[golden]"], "values of 'golden'; all have: gold_reward, "),
        (["a", "b", "--measures", "[credit]"], "values of 'credit'"),
        (["a", "b", "--measures", "gold_reward"], "measures must be a list"),
        (["a", "b", "--require", "golden"], "values of 'golden'"),
        (["a", "b", "--require", "length"], "neither direction of length is better"),
        (["a", "empty"], "share no measure"),
        (["a", "b", "--num_resamples", "10"], "num_resamples must be at least 100"),
        (["a", "b", "--outptu", "x"], "did you mean 'output'"),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    write("a")
    write("b")
    write("empty", kinds=[])
    Path("notes").mkdir()
    Path("notes/measures.json").write_text("[]")
    assert main(["compare", *argv]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_help(capsys):
    assert "--require" in compare(capsys, "--help")
