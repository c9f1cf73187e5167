"""What the report says of runs and evaluations, and of hostile and broken ones."""

import json
import math
import re

import pytest

from report.made_files import make_evaluation, make_run
from report.test_page import HOSTILE, Elements, policy_of
from tokenratio import write_report
from tokenratio.errors import TokenRatioError
from tokenratio.report.as_markdown import report_markdown
from tokenratio.report.run_report import build_report


def words(page):
    """The page's text, without scripts and data."""
    body = page[page.index("<main") : page.index("</main>")]
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def written(tmp_path, *runs):
    path = write_report(runs, tmp_path / "report.html")
    return path.read_text(encoding="utf-8")


def sections(page):
    return [a["id"] for tag, a, _ in Elements(page).found if tag == "section"]


def test_one_run(tmp_path):
    run = make_run(tmp_path / "mine")
    page = written(tmp_path, run)
    text = words(page)
    assert sections(page) == ["curves", "ends", "data", "settings", "versions"]
    for part in (
        "org/start",
        "frozen copy of the starting policy (org/start) abababababab",
        "pairs.jsonl, 97 rows, d1d1d1d1d1d1",
        "60 steps",
        "cpu (no GPU found)",
        "higher reward in 80.0% (95 % interval 70.0% to 90.0%)",
        "No alarms.",
        "empty response",
        "pairs.jsonl:7",
        "learning_rate 0.0001",
    ):
        assert part in text, part
    assert len(page.encode()) < 8_000_000


def test_figures_are_data_and_plotly_is_inside_once(tmp_path):
    page = written(tmp_path, make_run(tmp_path / "mine"))
    elements = Elements(page)
    (data,) = [t for a, t in elements.texts("script") if a.get("type") == "application/json"]
    figures = json.loads(data)
    drawn = [a["data-figure"] for tag, a, _ in elements.found if tag == "figure"]
    assert [figure["name"] for figure in figures] == drawn
    assert page.count("* plotly.js v") == 1
    assert "connect-src" not in policy_of(page)


def test_an_evaluation_beside_the_run_is_found(tmp_path):
    run = make_run(tmp_path / "mine")
    make_evaluation(tmp_path / "evaluation", {"policy": (run, 0.5), "other": ("elsewhere", 1.0)})
    text = words(written(tmp_path, run))
    assert re.search(
        r"gold prefers its answers to those of reference in [\d.]+% \(95 % interval", text
    )
    assert "policy answers prompts:0." in text
    assert "reference answers prompts:0." in text
    assert "other answers" not in text
    assert "policy − reference" in text


def test_an_evaluation_of_another_run_is_not_taken(tmp_path):
    run = make_run(tmp_path / "mine")
    make_evaluation(tmp_path / "evaluation", {"policy": ("runs/mine/not", 0.5)})
    assert "answers prompts" not in words(written(tmp_path, run))


def test_a_path_of_another_working_directory_is_recognised(tmp_path):
    run = make_run(tmp_path / "runs" / "mine")
    make_evaluation(tmp_path / "runs" / "evaluation", {"policy": ("runs/mine", 0.5)})
    assert "policy answers" in words(written(tmp_path, run))


def test_a_damaged_evaluation_is_left_out_with_the_reason(tmp_path):
    run = make_run(tmp_path / "mine")
    folder = make_evaluation(tmp_path / "evaluation", {"policy": (run, 0.5)})
    (folder / "policy" / "measures.json").write_text("{")
    text = words(written(tmp_path, run))
    assert "an evaluation is left out" in text
    with pytest.raises(TokenRatioError, match=r"policy/measures.json: not JSON"):
        build_report([run, folder])


def test_several_runs_are_compared(tmp_path):
    settings = {"max_grad_norm": 5.0}
    runs = [
        make_run(tmp_path / "b", config=settings),
        make_run(tmp_path / "a", seed=1, config={**settings, "learning_rate": 3e-5}),
    ]
    gains = {"a": (runs[1], 0.5), "b": (runs[0], 1.0)}
    folder = make_evaluation(tmp_path / "evaluation", gains)
    page = written(tmp_path, *runs, folder)
    found = sections(page)
    assert found[:3] == ["measures", "comparison", "maps"]
    report = build_report([*runs, folder])
    figures = {figure.name: figure for figure in report.figures}
    assert {"frontier", "diversity", "margin"} <= figures.keys()
    named = {section.name: section for section in report.sections}
    differ, same = named["settings"].tables
    assert differ.rows == [("learning_rate", "0.0001", "3e-05")]
    assert same.rows == [("max_grad_norm", "5.0")]
    pairs = [row[1] for row in named["comparison"].tables[0].rows[:3]]
    assert pairs == ["b − a", "b − reference", "a − reference"]  # in the order of the runs


def rows_of(report, name, table=0):
    (section,) = [section for section in report.sections if section.name == name]
    return section.tables[table].rows


def test_settings_that_are_each_methods_default_differ_between_methods(tmp_path):
    shared = {"seed": 0, "beta": 0.1}
    tbpo = {**shared, "generator": "sba", "generator_lambda": 0.5, "output_dir": "a"}
    dpo = {**shared, "loss": "dpo", "generator": "lr", "generator_lambda": None, "output_dir": "b"}
    report = build_report(
        [make_run(tmp_path / "a", config=tbpo), make_run(tmp_path / "b", config=dpo)]
    )
    differ = {name: values for name, *values in rows_of(report, "settings")}
    assert differ.keys() == {"loss", "generator", "generator_lambda"}
    assert differ["loss"] == ["tbpo_a", "dpo"]


def test_two_policies_are_compared_by_what_both_have(tmp_path):
    """The reference has no win rate, the policies have; three runs are compared with it too."""
    gains = {name: (f"runs/{name}", gain) for name, gain in (("a", 0.2), ("b", 0.4), ("c", 0.8))}
    report = build_report([make_evaluation(tmp_path / "evaluation", gains)])
    rows = rows_of(report, "comparison")
    found = {(measure.split()[0], pair) for measure, pair, *_ in rows}
    assert ("win_rate/gold", "a − b") in found
    assert {("gold_reward", f"{name} − reference") for name in "abc"} <= found
    assert not [pair for name, pair in found if name.startswith("win_rate") and "reference" in pair]


def test_an_even_win_rate_is_not_told_as_a_win(tmp_path):
    run = make_run(tmp_path / "mine")
    folder = make_evaluation(tmp_path / "evaluation", {"policy": (run, 0.0)}, num=200)
    text = " ".join(line for _, line in build_report([run, folder]).verdict)
    assert re.search(r"in 51.0% \(95 % interval 44.1% to 57.9%\): no clear winner\.", text), text


def test_the_interval_of_a_share_is_not_a_point(tmp_path):
    """Wilson's, of 24 prompts that all agree."""
    folder = make_evaluation(tmp_path / "evaluation", {"policy": ("runs/mine", 9.0)})
    found = {name: cells for name, *cells in rows_of(build_report([folder]), "measures")}
    assert found["win_rate/gold ↑"] == ["–", "100.0 ± 0.0%\n[86.2 to 100]"]


def test_many_policies_are_compared_with_the_reference_and_the_first(tmp_path):
    gains = {name: (f"runs/{name}", place / 4) for place, name in enumerate("abcd", 1)}
    report = build_report([make_evaluation(tmp_path / "evaluation", gains)])
    pairs = {pair for _, pair, *_ in rows_of(report, "comparison")}
    with_first = {f"a − {name}" for name in "bcd"}
    assert pairs == with_first | {f"{name} − reference" for name in "abcd"}
    (section,) = [section for section in report.sections if section.name == "comparison"]
    assert "a with every other" in section.tables[0].caption


def test_a_certain_difference_is_seen_among_many_comparisons(tmp_path):
    """Holm multiplies the smallest p-value, which the number of sign flips sets."""
    gains = {f"p{place:02}": (f"runs/{place}", 0.5 + place / 8) for place in range(30)}
    rows = rows_of(build_report([make_evaluation(tmp_path / "evaluation", gains)]), "comparison")
    assert len(rows) > 101
    assert [row[-1] for row in rows if row[1] == "p29 − reference" and "reward" in row[0]] == [
        "p29"
    ]


def test_the_same_alarm_of_several_runs_is_told_once(tmp_path):
    runs = [
        make_run(tmp_path / name, config={"beta": beta}, kl_ref_policy=lambda t: 2 * t * t)
        for name, beta in (("a", 0.1), ("b", 0.2))
    ]
    ((about, alarm),) = build_report([*runs, make_run(tmp_path / "calm")]).alarms
    assert about == "a, b"
    assert alarm.text.count("still rises") == 2
    assert alarm.advice.count("Raise beta") == 1


def test_the_frontier_is_drawn_as_evaluate_prints_it(tmp_path):
    from tokenratio.evaluation.frontier import frontier_lines
    from tokenratio.evaluation.results import PolicyMeasures

    gains = {"a": ("runs/a", 0.5), "b": ("runs/b", 1.0), "c": ("runs/c", 0.8)}
    folder = make_evaluation(tmp_path / "evaluation", gains)
    report = build_report([folder])
    (figure,) = [figure for figure in report.figures if figure.name == "frontier"]
    (table,) = [s.tables[0] for s in report.sections if s.name == "maps"]
    policies = [PolicyMeasures.load(folder / name) for name in ("reference", "a", "b", "c")]
    line = frontier_lines(policies, "reference")[1]
    assert f"tbpo_a: {table.rows[0][1]} ±" in line
    hull, points, reference = figure.traces
    assert (hull["x"][0], reference["x"]) == (0, [0])
    assert points["text"] == ["a", "b", "c"]
    assert points["error_y"]["array"][0] > 0


def test_an_estimated_kl_below_0_is_a_policy_like_the_reference(tmp_path):
    gains = {"a": ("runs/a", 0.5), "b": ("runs/b", 1.0)}
    folder = make_evaluation(tmp_path / "evaluation", gains)
    path = folder / "a" / "measures.json"
    document = json.loads(path.read_text())
    (kl,) = [m for m in document["measures"] if m["name"] == "kl_policy_ref"]
    kl["values"] = [[*where, -1e-3] for *where, _ in kl["values"]]
    path.write_text(json.dumps(document))
    (figure,) = [figure for figure in build_report([folder]).figures if figure.name == "frontier"]
    assert figure.traces[1]["x"][0] == 0


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_shown_and_do_nothing(text, tmp_path):
    run = make_run(tmp_path / "mine", config={"run_name": text, "optim_args": text})
    record = json.loads((run / "run.json").read_text())
    record["model"] = record["data"]["train"]["sources"][0]["name"] = text
    record["data"]["train"]["refused"] = {text: {"rows": 1, "examples": [{"origin": text}]}}
    (run / "run.json").write_text(json.dumps(record))
    lines = [{"step": i, "loss": 0.5, f"own {text}": 0.1} for i in range(1, 20)]
    make_run(tmp_path / "other", lines=lines)
    if "\ud800" not in text:
        make_evaluation(
            tmp_path / "evaluation",
            {"policy": (run, 0.5)},
            prompts=[f"{i} {text}" for i in range(6)],
            answers=lambda name, id: f"{name} {text}",
        )
    page = written(tmp_path, run, f"named={tmp_path / 'other'}")
    elements = Elements(page)
    calm = Elements(written(tmp_path, make_run(tmp_path / "calm")))
    executed = [t for a, t in elements.texts("script") if "type" not in a]
    assert executed == [t for a, t in calm.texts("script") if "type" not in a]
    assert not elements.texts("img")
    assert "alert(1)" not in "".join(executed)
    markdown = report_markdown(build_report([run, tmp_path / "other"]))
    assert "<script" not in markdown
    assert "<img" not in markdown


def test_what_is_invisible_or_reorders_is_written_out(tmp_path):
    """In names, alarms, curves and answers."""
    run = make_run(tmp_path / "mine", kl_ref_policy=lambda t: 2 * t * t)
    name = "good \u202eevil\u200b"
    other = make_run(tmp_path / "other", kl_ref_policy=lambda t: 2 * t * t)
    make_evaluation(
        tmp_path / "evaluation", {"policy": (run, 0.5)}, answers=lambda name, id: "a\u2066b\nc"
    )
    page = written(tmp_path, f"{name}={run}", other)
    assert not set(page[page.index("<main") :]) & set("\u202e\u200b\u2066")
    assert "<bdi>good U+202EevilU+200B, other</bdi>" in page
    assert "aU+2066b\nc" in page
    report = build_report([f"{name}={run}", other])
    drawn = {trace["name"] for figure in report.figures for trace in figure.to_dict()["data"]}
    assert "good U+202EevilU+200B" in drawn


def test_tags_in_names_are_not_plotlys(tmp_path):
    run = make_run(tmp_path / "mine")
    other = make_run(tmp_path / "other")
    report = build_report([f"<a>y</a>={run}", other])
    names = {trace["name"] for figure in report.figures for trace in figure.to_dict()["data"]}
    assert "&lt;a>y&lt;/a>" in names
    assert not any("<" in name for name in names)


def test_what_the_log_lacks_is_said(tmp_path):
    lines = [{"step": step, "loss": 0.5, "rewards/margins": 0.1} for step in range(1, 9)]
    lines[3]["rewards/margins"] = math.nan
    run = make_run(tmp_path / "mine", lines=[*lines, lines[0]])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    assert build_report([run]).missing == [
        "mine: the last line of metrics.jsonl is cut off and left out",
        "mine: metrics.jsonl logs 1 step again later: the last line counts",
        "mine: rewards/margins: 1 value not finite, left out",
    ]


def test_a_run_without_a_log_is_not_called_calm(tmp_path):
    run = make_run(tmp_path / "mine")
    (run / "metrics.jsonl").unlink()
    page = written(tmp_path, run)
    assert "No alarms" not in page
    assert "No step is logged of mine: its alarms are not known." in words(page)
    assert 'class="calm"' not in page


def test_a_cut_answer_is_marked(tmp_path):
    folder = make_evaluation(tmp_path / "evaluation", {"policy": ("runs/mine", 0.5)})
    path = folder / "policy" / "generations.jsonl"
    path.write_text(path.read_text().replace('"eos"', '"length"', 1))
    (answers,) = [s.answers for s in build_report([folder]).sections if s.name == "answers"]
    marked = [(a.id, name) for a in answers for name, _, of in a.responses if "cut" in of]
    assert marked == [("prompts:0", "policy")]


@pytest.mark.parametrize("name", ["rewards/accuracies", "state_weight/clamped", "epoch"])
def test_a_figure_that_is_no_number_is_named(name, tmp_path):
    run = make_run(tmp_path / "mine", lines=[{"step": 1, "loss": 0.5, name: "many"}])
    with pytest.raises(TokenRatioError, match=rf"metrics.jsonl:1: {name} is 'many', not a number"):
        build_report([run])


def test_the_end_of_a_run_need_not_be_logged(tmp_path):
    """With logging_steps of 10, a run of 25 steps logs 20 at last."""
    config = {"max_steps": 25, "logging_steps": 10}
    lines = [{"step": step, "loss": 0.5} for step in (10, 20)]
    run = make_run(tmp_path / "mine", config=config, lines=lines, held_out=False)
    assert "is logged" not in str(build_report([run]).verdict)
    half = make_run(tmp_path / "half", config=config, lines=lines[:1], held_out=False)
    assert "40% of the run is logged" in str(build_report([half]).verdict)
    early = make_run(tmp_path / "early", config=config, lines=lines[:1])  # evaluated at its end
    assert "is logged" not in str(build_report([early]).verdict)


def test_an_accuracy_that_is_nan_is_not_told(tmp_path):
    run = make_run(tmp_path / "mine")
    (run / "eval.json").write_text('{"held_out": {"accuracy": NaN}}')
    assert "nan" not in str(build_report([run]).verdict)


def test_a_name_for_an_evaluation_is_refused(tmp_path):
    folder = make_evaluation(tmp_path / "evaluation", {"p": ("x", 0.5)})
    with pytest.raises(TokenRatioError, match=r"evaluation is an evaluation.*leave out mine="):
        build_report([f"mine={folder}"])


def test_a_run_that_has_just_begun(tmp_path):
    run = make_run(tmp_path / "mine", lines=[], held_out=False)
    text = words(written(tmp_path, run))
    assert "Nothing has been logged yet." in text
    assert "metrics.jsonl holds no training step yet" in text
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "epoch": 0.25, "loss": 0.5}\n{"step": 2, "lo')
    text = words(written(tmp_path, run))
    assert "25% of the run is logged, up to step 1." in text


def test_without_run_json_the_curves_are_shown(tmp_path):
    run = make_run(tmp_path / "mine")
    (run / "run.json").unlink()
    page = written(tmp_path, run)
    assert "curves" in sections(page)
    assert "run.json is missing or not readable" in words(page)


def test_without_metrics_the_settings_are_shown(tmp_path):
    run = make_run(tmp_path / "mine")
    (run / "metrics.jsonl").unlink()
    page = written(tmp_path, run)
    assert "settings" in sections(page)
    assert "there are no curves" in words(page)
    assert "plotly.js v" not in page


def test_what_is_no_run_is_refused_with_what_to_give(tmp_path):
    make_run(tmp_path / "runs" / "a")
    make_evaluation(tmp_path / "runs" / "evaluation", {"p": ("x", 0.5)})
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for path, message in (
        ("runs", r"runs is neither a run .*; give what it holds: .*runs/a .*runs/evaluation"),
        ("none", "none does not exist"),
        ("file", "file is a file: give the run's folder"),
        ("empty", r"empty is neither a run \(it has no run.json"),
    ):
        with pytest.raises(TokenRatioError, match=message):
            build_report([tmp_path / path])
    run = tmp_path / "runs" / "a"
    with pytest.raises(TokenRatioError, match="a run is given twice"):
        build_report([run, f"again={run}"])
    with pytest.raises(TokenRatioError, match="a run is given twice"):
        build_report([run, run])
    with pytest.raises(TokenRatioError, match="two runs are called a"):
        build_report([f"a={run}", f"a={make_run(tmp_path / 'b')}"])


def test_a_damaged_run_is_named(tmp_path):
    run = make_run(tmp_path / "mine")
    record = json.loads((run / "run.json").read_text())
    record["data"]["train"]["lengths"] = {"prompt": "many"}
    (run / "run.json").write_text(json.dumps(record))
    message = r"run.json: data.train.lengths.prompt is 'many', not a whole number"
    with pytest.raises(TokenRatioError, match=message):
        build_report([run])


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    runs = [make_run(tmp_path / seed / "dpo", seed=i) for i, seed in enumerate(("s0", "s1"))]
    report = build_report(runs)
    assert report.title == "s0/dpo, s1/dpo"


def test_markdown_has_verdict_alarms_and_tables(tmp_path):
    run = make_run(tmp_path / "mine", log_ratio__chosen=lambda t: -0.4 * t)
    make_evaluation(tmp_path / "evaluation", {"policy": (run, 0.5)})
    text = report_markdown(build_report([run]))
    assert text.startswith("<!-- Written by tokenratio report. -->\n\n## mine")
    assert "- **ALARM: Chosen responses lose probability** (mine)." in text
    assert "| metric | start | end | held out |" in text
    assert "### Paired comparison" in text
    assert "answers prompts:0" not in text
    assert len(text) < 12_000


def test_plotly_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(TokenRatioError, match=r"need plotly: pip install 'tokenratio\[report\]'"):
        write_report([make_run(tmp_path / "mine")], tmp_path / "report.html")
