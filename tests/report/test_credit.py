"""`tokenratio inspect` end to end, and its figures against those of losses and of `evaluate`."""

import json
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from loss_oracles import by_hand, sba
from report.credit_cases import byte_tokenizer, hostile_pairs, save_policies, write_pairs
from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio import InspectOptions, TokenRatioConfig, TokenRatioTrainer, inspect_pairs
from tokenratio.cli.main import main
from tokenratio.data import prepare_pairs
from tokenratio.data.template import TemplateSettings
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.inputs import LoadedPolicy
from tokenratio.evaluation.model_measures import measure_pairs
from tokenratio.models.loading import load_model
from tokenratio.report.credit_figures import PolicyFigures
from tokenratio.report.credit_page import write_credit_page
from tokenratio.report.credit_places import FIGURES
from tokenratio.report.credit_terminal import terminal_lanes
from tokenratio.types import PairStatistics, ResponseStatistics


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of tbpo_q with two checkpoints, on pairs of words; one pair is cut."""
    folder = tmp_path_factory.mktemp("run")
    tiny_model().save_pretrained(folder / "start")
    tiny_tokenizer().save_pretrained(folder / "start")
    write_pairs(folder / "train.jsonl", word_pairs(12))
    write_pairs(folder / "test.jsonl", word_pairs(6, seed=1))
    trainer = TokenRatioTrainer(
        str(folder / "start"),
        args=TokenRatioConfig(
            output_dir=str(folder / "run"),
            loss="tbpo_q",
            beta=0.2,
            learning_rate=1e-2,
            max_steps=4,
            save_steps=2,
            max_length=10,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            baseline_hidden_size=8,
            data_cache_dir=None,
        ),
        train_dataset=str(folder / "train.jsonl"),
        eval_dataset=str(folder / "test.jsonl"),
    )
    trainer.train()
    trainer.save_model()
    return folder / "run"


def inspected(run, **options):
    lines = []
    found = inspect_pairs([run], InspectOptions(**options), report=lines.append)
    return found, lines


def test_a_run_knows_its_reference_its_data_and_its_method(run):
    found, lines = inspected(run)
    assert found.reference == str(run.parent / "start")
    assert found.source == str(run.parent / "test.jsonl")
    assert [shown.name for shown in found.methods] == ["tbpo_q", "tbpo_a", "tdpo1", "dpo"]
    assert found.beta == 0.2
    assert "6 pairs of" in "\n".join(lines)


@pytest.mark.parametrize("has_held_out", [True, False])
def test_all_recorded_sources_are_shown_and_lost_ones_are_named(has_held_out, run, tmp_path):
    shutil.copytree(run.parent, tmp_path / "a")
    policy = tmp_path / "a" / "run"
    record = json.loads((policy / "run.json").read_text())
    more = write_pairs(tmp_path / "a" / "more.jsonl", word_pairs(5, seed=7))
    sources = [*record["data"]["eval"]["sources"], {"name": str(more)}, {"name": "a list"}]
    if has_held_out:
        record["data"]["eval"]["sources"] = sources
    else:
        record["data"] = {"train": {"digest": "0", "sources": sources}}
    (policy / "run.json").write_text(json.dumps(record))
    found, lines = inspected(policy)
    assert len(found.pairs) == 6 + 5
    assert found.source.endswith("test.jsonl, " + str(more))
    assert "11 pairs of" in "\n".join(lines)
    assert "pairs of a list are not shown: it cannot be read again" in found.notes


def statistics_of(records):
    """The pairs of a file of figures, as the oracles read them."""
    longest = max(len(record[side]["ids"]) for record in records for side in ("chosen", "rejected"))

    def array(values):
        rows = torch.zeros(len(records), longest, dtype=torch.float64)
        for row, each in zip(rows, values, strict=True):
            row[: len(each)] = torch.tensor(each, dtype=torch.float64)
        return rows

    def side(name):
        columns = [array([r[name][key] for r in records]) for key in ("log_probs", "ref_log_probs")]
        kl = array([record[name]["kl_ref_policy"] for record in records])
        mask = array([[1.0] * len(record[name]["ids"]) for record in records]).bool()
        zero = torch.zeros_like(kl)
        return ResponseStatistics(columns[0].requires_grad_(), mask, columns[1], kl, zero)

    weight = array([record["methods"]["tbpo_q"]["steps"]["log_state_weight"] for record in records])
    return PairStatistics(side("chosen"), side("rejected"), weight)


def test_the_figures_of_a_file_are_those_of_the_losses(run, tmp_path):
    found, _ = inspected(run, losses=["tbpo_a", "tbpo_q", "dpo", "tdpo1", "ipo", "simpo"], beta=0.3)
    found.write_jsonl(tmp_path / "figures.jsonl")
    records = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    pair = statistics_of(records)
    for shown in found.methods:
        given = {k: v for k, v in shown.settings.items() if k != "generator"}
        if "generator" in shown.settings:
            given["ell"] = sba(shown.settings["generator"].lam)
        assert given["beta"] == 0.3
        expected = by_hand(shown.name, pair, **given)
        losses = [record["methods"][shown.name]["loss"] for record in records]
        assert losses == pytest.approx(expected.tolist(), rel=1e-9)
        gradient = torch.autograd.grad(expected.sum(), pair.chosen.log_probs, retain_graph=True)[0]
        for row, record in enumerate(records):
            push = record["methods"][shown.name]["push"]["chosen"]
            assert push == pytest.approx((-gradient[row, : len(push)]).tolist(), abs=1e-12)
    assert any(abs(value) > 1e-3 for value in pair.log_state_weight.flatten().tolist())
    for record in records:
        for name in ("chosen", "rejected"):
            side = record[name]
            rho = np.array(side["log_probs"]) - np.array(side["ref_log_probs"])
            assert side["log_ratio"] == pytest.approx(rho.tolist(), abs=1e-12)
            assert record["rewards"][name] == pytest.approx(0.3 * rho.sum())


def test_token_figures_are_those_of_the_models_own_logits(run):
    """And the sum of ρ is what `evaluate` calls the margin."""
    found, _ = inspected(run, top=3)
    policy, reference = (load_model(path) for path in (run, run.parent / "start"))
    for record in list(found.records())[:2]:
        index = record["pair"]
        for name in ("chosen", "rejected"):
            row = getattr(found.pairs[index], name).row
            ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
            states = slice(len(row.prompt_ids) - 1, -1)
            with torch.no_grad():
                log_p, log_q = (
                    model(input_ids=ids).logits[0, states].double().log_softmax(-1)
                    for model in (policy, reference)
                )
            side, labels = record[name], torch.tensor(row.response_ids)[:, None]
            assert side["log_probs"] == pytest.approx(
                log_p.gather(1, labels)[:, 0].tolist(), abs=1e-5
            )
            assert side["ref_log_probs"] == pytest.approx(
                log_q.gather(1, labels)[:, 0].tolist(), abs=1e-5
            )
            kl = (log_q.exp() * (log_q - log_p)).sum(-1)
            assert side["kl_ref_policy"] == pytest.approx(kl.tolist(), abs=1e-5)
            entropy = -(log_p.exp() * log_p).sum(-1)
            assert side["entropy"] == pytest.approx(entropy.tolist(), abs=1e-5)
            for step, likeliest in enumerate(side["alternatives"]):
                ids_found = {each["id"] for each in likeliest}
                wanted = [p[step].topk(3).indices.tolist() for p in (log_p, log_q)]
                assert ids_found == {*wanted[0], *wanted[1]}
                by_policy = [each["log_prob"] for each in likeliest]
                assert by_policy == sorted(by_policy, reverse=True)
                first = likeliest[0]
                assert first["ref_log_prob"] == pytest.approx(
                    float(log_q[step, first["id"]]), abs=1e-5
                )
    data = prepare_pairs(
        str(run.parent / "test.jsonl"), tiny_tokenizer(), max_length=10, max_prompt_length=None
    )
    loaded = LoadedPolicy(policy, reference, tiny_tokenizer(), TemplateSettings(), batch_size=4)
    measures = {each.name: each.mean for each in measure_pairs(loaded, data, beta=0.2)}
    margins = [record["rewards"]["margin"] for record in found.records()]
    assert np.mean(margins) == pytest.approx(measures["pairs/margin"], abs=1e-6)
    assert np.mean([margin > 0 for margin in margins]) == measures["pairs/accuracy"]


def test_boundary_divergence_and_cuts(run):
    found, _ = inspected(run)
    assert any(pair.chosen.cut or pair.rejected.cut for pair in found.pairs)
    assert any("cut at the length limits" in note for note in found.notes)
    for pair in found.pairs:
        chosen, rejected = pair.chosen.row.response_ids, pair.rejected.row.response_ids
        assert pair.num_shared == min(len(chosen), len(rejected))
        assert chosen[: pair.divergence] == rejected[: pair.divergence]
        if pair.divergence < pair.num_shared:
            assert chosen[pair.divergence] != rejected[pair.divergence]
        for side in (pair.chosen, pair.rejected):
            assert (side.tokens[-1].kind == "end") == (side.cut == 0)


def test_checkpoints_are_policies_of_the_same_pairs(run):
    found, _ = inspected(run, checkpoints=True)
    names = [policy.name for policy in found.policies]
    assert [name.rpartition(".")[2] for name in names[:2]] == ["checkpoint-2", "checkpoint-4"]
    first, second, last = (np.concatenate([v.log_ratio for v in p.chosen]) for p in found.policies)
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(second, last)  # the run ends with its last checkpoint


def test_a_run_of_another_reference_and_with_other_settings_is_noted(run, tmp_path):
    """Two runs are compared with one reference, and rewards have one β."""
    shutil.copytree(run.parent, tmp_path / "b")
    other = tmp_path / "b" / "run"
    record = json.loads((other / "run.json").read_text())
    record["config"] = {"loss": "tdpo2", "beta": 0.01}
    record["reference"]["sha256"] = "0" * 64
    (other / "run.json").write_text(json.dumps(record))
    found = inspect_pairs([f"a={run}", f"b={other}"], InspectOptions(), report=lambda line: None)
    assert [each.name for each in found.methods if each.is_own] == ["tbpo_q", "tdpo2"]
    about = [note for note in found.notes if "a: " in note or "b" in note.split()[0]]
    assert len(about) == 2
    assert about[0].startswith("b is not shown with its own settings: rewards have β = 0.2")
    assert about[1].startswith("b: ALARM: it was trained against another reference")
    given = inspect_pairs([f"b={other}"], InspectOptions(beta=0.3), report=lambda line: None)
    assert not any("own settings" in note for note in given.notes)


def test_worlds_know_what_tokens_are_worth(world, make_policy, tmp_path):
    tokenizer = world.build_tokenizer()
    for name, seed in (("policy", 0), ("reference", 1)):
        make_policy(seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    source = "world:reviews?pairs=3&seed=5"
    options = InspectOptions(reference=str(tmp_path / "reference"), data=source)
    found = inspect_pairs([tmp_path / "policy"], options, report=lambda line: None)
    assert found.value_name == "true advantage"
    side = found.pairs[0].chosen
    words = tokenizer.convert_ids_to_tokens
    expected = world.token_values(
        words(list(side.row.prompt_ids)), words(list(side.row.response_ids))
    )
    np.testing.assert_array_equal(side.value, expected.advantage)
    assert not any("not shown" in note for note in found.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": None, "data": "pairs.jsonl"}, "did not record what it was trained from"),
        ({"reference": "reference"}, "did not record data that can be read again: give --data"),
        ({"reference": "other", "data": "pairs.jsonl"}, "have different tokenizers"),
        ({"reference": "reference", "data": "missing.jsonl"}, "missing.jsonl: no such file"),
        ({"reference": "reference", "data": "same.jsonl"}, "None of the 1 rows|no row|1 refused"),
        ({"reference": "wide", "data": "pairs.jsonl"}, "predicts 16 tokens, the reference 20"),
    ],
)
def test_what_cannot_be_inspected_says_why(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, tokenizer, size in (
        ("policy", tiny_tokenizer(), 16),
        ("reference", tiny_tokenizer(), 16),
        ("wide", tiny_tokenizer(), 20),
    ):
        tiny_model(vocab_size=size).save_pretrained(name)
        tokenizer.save_pretrained(name)
    byte_tokenizer().save_pretrained("other")
    write_pairs(tmp_path / "pairs.jsonl", word_pairs(3))
    write_pairs(tmp_path / "same.jsonl", [{"prompt": "ash", "chosen": "bay", "rejected": "bay"}])
    with pytest.raises(TokenRatioError, match=message):
        inspect_pairs(["policy"], InspectOptions(**options), report=lambda line: None)


def test_settings_outside_their_domain_are_refused():
    for setting, message in (
        ({"world": "sentiment"}, "world must be a name such as world:sentiment"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"losses": []}, "losses must name at least one method, each once"),
        ({"losses": ["dpo", "dpo"]}, "losses must name at least one method, each once"),
        ({"num_pairs": 0}, "num_pairs must be at least 1"),
        ({"dtype": "int8"}, "dtype must be one of"),
    ):
        with pytest.raises(TokenRatioError, match=message):
            InspectOptions(**setting)


def test_the_command_writes_page_and_figures(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", str(run), "--num_pairs", "3", "--jsonl", "figures.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "page: credit.html" in out
    lines = Path("figures.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["pair"] for record in records] == [0, 1, 2]
    assert set(records[0]) == FIGURES
    assert main(["inspect", str(run), "--num_pairs", "3", "--jsonl", "figures.jsonl"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "."], "is a folder"),
        (["--output", "mine.html"], "mine.html exists and is no report"),
        (["--jsonl", "mine.jsonl"], "mine.jsonl exists and holds no figures"),
        (["--jsonl", "lines.txt"], "lines.txt exists and holds no figures"),
        (["--jsonl", "."], "exists and holds no figures"),
        (["--output", "a", "--jsonl", "./a"], "a is both --output and --jsonl"),
        (["--data", "pairs.jsonl", "--jsonl", "pairs.jsonl"], "is the file of the pairs"),
    ],
)
def test_a_file_of_another_kind_is_refused_before_a_model_runs(
    flags, message, run, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    kept = {
        "mine.html": "<title>Token credit</title>",
        "mine.jsonl": '{"pair": "my own data", "x": 1}\n',
        "lines.txt": "not JSON\n",
    }
    for name, text in kept.items():
        Path(name).write_text(text)
    write_pairs(tmp_path / "pairs.jsonl", word_pairs(3))
    assert main(["inspect", str(run), *flags]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "device:" not in printed.out
    assert {name: Path(name).read_text() for name in kept} == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "pairs.jsonl"])


def test_figures_and_page_from_python_replace_their_own_alone(run, tmp_path):
    found, _ = inspected(run, num_pairs=1)
    for name, write, message in (
        ("figures.jsonl", found.write_jsonl, "holds no figures"),
        ("page.html", lambda path: write_credit_page(found, path), "is no report"),
    ):
        path = tmp_path / name
        write(path)
        write(path)
        path.write_text('{"pair": "my own data"}\n')
        with pytest.raises(TokenRatioError, match=message):
            write(path)
        assert path.read_text() == '{"pair": "my own data"}\n'


def test_the_list_has_the_margin_s_own_sign_where_rewards_round_alike(run):
    found, _ = inspected(run, num_pairs=1)
    policy = found.policies[0]
    for values, reward in ((policy.chosen[0], -12.34604), (policy.rejected[0], -12.34561)):
        values.log_probs[:] = values.ref_log_probs
        values.log_probs[0] += reward / found.beta
    ((chosen, margin, *_),) = PolicyFigures(found, policy).overview()
    assert (chosen, margin) == (-12.346, pytest.approx(-0.00043))


def columns(line):
    """Those that a terminal takes for it."""
    wide = sum(unicodedata.east_asian_width(each) in "WF" for each in line)
    return len(line) + wide - sum(unicodedata.category(each) in ("Mn", "Me") for each in line)


def test_lanes_in_a_terminal_escape_what_would_move_the_cursor(tmp_path, capsys, monkeypatch):
    policy, reference = save_policies(tmp_path, byte_tokenizer())
    data = write_pairs(tmp_path / "pairs.jsonl", hostile_pairs())
    monkeypatch.setenv("COLUMNS", "100")
    arguments = ["inspect", str(policy), "--reference", str(reference), "--data", str(data)]
    assert main([*arguments, "--terminal", "--losses", "[dpo]"]) == 0
    out = capsys.readouterr().out
    assert all(character.isprintable() or character == "\n" for character in out)
    assert "\\x1b" in out
    assert "\\u202e" in out
    assert "(wrongly ordered)" in out
    lanes = [line for line in out.splitlines() if line.startswith(("chosen", "rejected", "  ρ"))]
    assert lanes
    assert max(map(columns, lanes)) <= 100
    assert not (tmp_path / "credit.html").exists()


def test_colours_only_where_a_terminal_takes_them(run, monkeypatch):
    found, _ = inspected(run, num_pairs=2)
    found = replace(found, policies=found.policies[-1:])

    def text(*, is_terminal, no_colour=""):
        monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
        monkeypatch.setenv("NO_COLOR", no_colour)
        return "\n".join(terminal_lanes(found, width=80))

    assert "\x1b[30;48;5;" in text(is_terminal=True)
    assert "\x1b" not in text(is_terminal=True, no_colour="1")
    assert "\x1b" not in text(is_terminal=False)
