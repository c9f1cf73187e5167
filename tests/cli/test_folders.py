"""One command starts or resumes a run; folders in use, of others, or half removed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio.cli.folders import claim_folder
from tokenratio.cli.main import main
from tokenratio.errors import TokenRatioError
from tokenratio.locks import LOCK_FILE
from tokenratio.run_folder import read_run_file, write_run_file
from tokenratio.training.callbacks import MetricsWriter

RESUME = ("--resume_from_checkpoint", "true")


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A function that runs a recipe with one or two stages; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    for name, num in (("train", 24), ("other", 20)):
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, word_pairs(num))))
    document = {
        "model": "model",
        "train_dataset": "train.jsonl",
        "output_dir": "run",
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "save_steps": 1,
        "max_length": 32,
        "use_cpu": True,
    }

    def run(*flags, **changes):
        Path("r.yaml").write_text(yaml.safe_dump({**document, **changes}))
        return main(["train", "r.yaml", *flags])

    return run


@pytest.fixture
def interrupt(monkeypatch):
    """Ends every stage of a loss after so many steps, as Ctrl-C does."""
    on_log = MetricsWriter.on_log

    def at(step, loss):
        def interrupted(self, args, state, *rest, **more):
            on_log(self, args, state, *rest, **more)
            if state.global_step == step and args.loss == loss:
                raise KeyboardInterrupt

        monkeypatch.setattr(MetricsWriter, "on_log", interrupted)

    yield at
    monkeypatch.setattr(MetricsWriter, "on_log", on_log)


def steps(folder):
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def weights(folder):
    return {k: v.tolist() for k, v in load_file(Path(folder, "model.safetensors")).items()}


@pytest.mark.slow
def test_one_command_starts_and_resumes(recipe, interrupt, caplog):
    """What a scheduler runs again: with nothing there, killed early, killed later, and done."""
    said = "no complete checkpoint in run: starting from the beginning"
    interrupt(1, "tbpo_a")  # before the first checkpoint
    assert recipe(*RESUME) == 130
    assert said in caplog.text
    caplog.clear()
    Path("run", "checkpoint-1").mkdir()  # half written
    interrupt(3, "tbpo_a")
    assert recipe(*RESUME) == 130
    assert said in caplog.text
    caplog.clear()
    interrupt(99, "tbpo_a")
    assert recipe(*RESUME) == 0
    assert said not in caplog.text
    assert steps("run") == [1, 2, 3, 4]
    assert not Path("run", LOCK_FILE).exists()
    resumed = weights("run")
    assert recipe(*RESUME) == 0
    assert weights("run") == resumed
    assert recipe("--output_dir", "whole") == 0
    assert weights("whole") == resumed


def test_what_is_not_resumed_is_not_removed(recipe, capsys):
    assert recipe("--save_only_model", "true", "--max_steps", "1") == 0
    assert recipe(*RESUME) == 2
    assert "it was saved without its optimizer" in capsys.readouterr().err
    assert recipe("--overwrite", "--save_strategy", "no", "--max_steps", "1") == 0
    assert recipe(*RESUME) == 2
    assert "run holds a trained model and no checkpoint" in capsys.readouterr().err
    assert recipe(*RESUME, "--output_dir", "model") == 2
    assert "output_dir model is a model that the run starts from" in capsys.readouterr().err
    Path("foreign").mkdir()
    Path("foreign", "model.safetensors").write_bytes(Path("model/model.safetensors").read_bytes())
    assert recipe(*RESUME, "--output_dir", "foreign") == 2
    assert "was not written by tokenratio" in capsys.readouterr().err
    assert recipe(*RESUME, "--overwrite") == 2
    assert "give only one of them" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_not_resumed_over_another(recipe, capsys):
    assert recipe("--output_dir", "first") == 0
    assert recipe() == 0
    flags = ("--resume_from_checkpoint", "first/checkpoint-2")
    assert recipe(*flags) == 2
    assert "run already holds a run" in capsys.readouterr().err
    before = json.loads(Path("first/run.json").read_text())
    assert recipe(*flags, "--output_dir", "third") == 0
    record = json.loads(Path("third/run.json").read_text())
    assert weights("third") == weights("first")
    assert record["run_folder"] == str(Path("third").resolve())
    assert record["config"] == {**before["config"], "output_dir": "third"}
    assert [entry["step"] for entry in record["resumptions"]] == [2]


@pytest.fixture
def in_use():
    """The folder `run`, held by another process; its id."""
    code = "import time; from tokenratio.locks import held\n"
    code += "with held('run'): print(1, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process.pid
    process.kill()
    process.communicate()
    assert [path.name for path in Path("run").iterdir()] == [LOCK_FILE]


@pytest.mark.parametrize("flags", [(), RESUME, ("--overwrite",)], ids=" ".join)
def test_a_folder_in_use_is_refused(flags, recipe, in_use, capsys):
    assert recipe(*flags) == 2
    assert f"run is in use by process {in_use} on" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "evaluate model --output_dir run --prompts world:reviews?prompts=2",
        "score-tokens train.jsonl --output run --positive_model model --negative_model x",
        "quickstart --output_dir run",
        "demo --output_dir run",
    ],
)
def test_other_commands_leave_a_folder_in_use_alone(command, recipe, in_use, capsys):
    assert main(command.split()) == 2
    assert f"run is in use by process {in_use} on" in capsys.readouterr().err


SFT = {"max_steps": 6, "per_device_train_batch_size": 2, "save_steps": 2, "learning_rate": 1e-3}


@pytest.mark.slow
def test_an_interrupted_first_stage_goes_on(recipe, interrupt, capsys):
    """Also without asking to resume, for the stage's folder has a name of its content."""
    assert recipe(sft={**SFT, "output_dir": "whole"}, output_dir="first") == 0
    interrupt(5, "sft")
    assert recipe(*RESUME, sft={**SFT, "output_dir": "cut"}) == 130
    assert not Path("cut", "model.safetensors").exists()
    interrupt(3, "tbpo_a")
    capsys.readouterr()
    assert recipe(*RESUME, sft={**SFT, "output_dir": "cut"}) == 130
    assert "resumed" in capsys.readouterr().out
    assert steps("cut") == [1, 2, 3, 4, 5, 6]
    assert json.loads(Path("cut/run.json").read_text())["resumptions"][0]["step"] == 4
    assert weights("cut") == weights("whole")
    interrupt(99, "")
    assert recipe(*RESUME, sft={**SFT, "output_dir": "cut"}) == 0
    assert "cut has the same settings and data; using it" in capsys.readouterr().out
    assert weights("run") == weights("first")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": 1e-2}, "began with learning_rate 0.001, not 0.01"),
        ({"loss": "dpo"}, "began with loss tbpo_a, not dpo"),
        ({"sft": {**SFT, "max_steps": 1}}, r"started from .*sft-\w+, and with its settings"),
        ({"output_dir": "model"}, "is a model that the run starts from"),
        ({"resume_from_checkpoint": "run/checkpoint-9"}, "does not exist"),
        ({"overwrite": True}, "give only one"),
        ({"eval_dataset": "none.jsonl"}, "none.jsonl"),
    ],
    ids=str,
)
def test_what_would_be_refused_later_is_refused_before_the_first_stage(
    changes, said, recipe, interrupt, capsys
):
    settings = {"sft": {**SFT, "max_steps": 2}, "resume_from_checkpoint": "true"}
    interrupt(3, "tbpo_a")
    assert recipe(**settings) == 130
    (stage,) = Path("runs/r").glob("sft-*")
    for path in stage.glob("*.json"):
        path.unlink()  # so that it would be trained again
    capsys.readouterr()
    assert recipe(**{**settings, **changes}) == 2
    printed = capsys.readouterr()
    assert said.split(".*")[-1].replace(r"sft-\w+, ", "") in printed.err
    assert printed.err.count("\n") == 1
    assert "saved in" not in printed.out


@pytest.mark.slow
def test_an_interrupted_scoring_stage_goes_on(recipe, interrupt, capsys):
    scored = {"loss": "tis_dpo", "score_tokens": {}}
    assert recipe(**scored, output_dir="first") == 0
    (whole,) = Path("runs/r").glob("score_tokens-*")
    kept = whole.rename("whole")
    interrupt(3, "dpo")
    assert recipe(*RESUME, **scored) == 130
    interrupt(99, "")
    capsys.readouterr()
    assert recipe(*RESUME, **scored) == 0
    assert "resumed" in capsys.readouterr().out
    name = "scores.safetensors"
    assert (whole / name).read_bytes() == (kept / name).read_bytes()
    assert weights("run") == weights("first")
    assert not list(whole.rglob("checkpoint-*"))
    # Both models trained, the scores not yet there.
    (whole / "scores.json").unlink()
    (whole / name).unlink()
    assert recipe("--overwrite", **scored) == 0
    assert capsys.readouterr().out.count("has been trained; using it") == 2
    assert (whole / name).read_bytes() == (kept / name).read_bytes()
    assert weights("run") == weights("first")


def old_run(folder):
    for name in ("checkpoint-2/model.safetensors", "base/origin.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    for name in ("config.json", "model.safetensors", "stage.json", "tokenizer.json"):
        (folder / name).touch()
    write_run_file(folder)


def test_a_removal_cut_off_anywhere_can_be_repeated(tmp_path, monkeypatch):
    unlink, calls = Path.unlink, [0]

    def cut_off(path, **options):
        if not calls[0]:
            raise KeyboardInterrupt
        calls[0] -= 1
        unlink(path, **options)

    for num in range(5):
        folder = tmp_path / str(num)
        old_run(folder)
        calls[0] = num
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", cut_off)
            with pytest.raises(KeyboardInterrupt):
                claim_folder(folder, overwrite=True, inputs=())
        with pytest.raises(TokenRatioError, match="already holds a run"):
            claim_folder(folder, overwrite=False, inputs=())
        claim_folder(folder, overwrite=True, inputs=())
        assert [path.name for path in folder.iterdir() if path.name != "base"] == []


FOREIGN = (
    {"config": {"loss": {"name": "focal"}}},
    {"config": {}, "versions": []},
    {"config": {}, "data": "c4"},
    {"config": {"max_steps": 10.0}, "versions": {"torch": "2.1"}},
)


@pytest.mark.parametrize("document", FOREIGN, ids=str)
def test_a_run_file_of_another_tool_marks_nothing(document, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(document))
    (tmp_path / "model.safetensors").touch()
    assert read_run_file(tmp_path) is None
    with pytest.raises(TokenRatioError, match="was not written by tokenratio"):
        claim_folder(tmp_path, overwrite=True, inputs=())
    assert (tmp_path / "model.safetensors").exists()


def test_a_damaged_run_file_leaves_the_checkpoints_ours(tmp_path):
    write_run_file(tmp_path / "checkpoint-1")
    (tmp_path / "run.json").write_text('{"versio')
    claim_folder(tmp_path, overwrite=True, inputs=())
    assert list(tmp_path.iterdir()) == []


def test_a_model_beside_a_run_file_of_another_tool_is_used(recipe, capsys):
    Path("model/run.json").write_text(json.dumps(FOREIGN[0]))
    assert recipe("--max_steps", "1", "--save_strategy", "no") == 0
    flags = ["--prompts", "world:reviews?prompts=2", "--max_new_tokens", "2"]
    assert main(["evaluate", "a=model", *flags, "--output_dir", "eval"]) == 0


def test_the_folder_of_an_earlier_version_is_removed_too(tmp_path):
    write_run_file(tmp_path)
    (tmp_path / "unfinished-checkpoint").mkdir()
    claim_folder(tmp_path, overwrite=True, inputs=())
    assert list(tmp_path.iterdir()) == []


def test_a_model_card_of_ours_marks_the_folder_too(tmp_path):
    """A removal by an earlier version, which removed run.json before the last files."""
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(TokenRatioError, match="was not written by tokenratio"):
        claim_folder(tmp_path, overwrite=True, inputs=())
    (tmp_path / "README.md").write_text(
        "---\n---\n<!-- Written by tokenratio from run.json; remove this line to keep your own "
        "changes. -->\n"
    )
    claim_folder(tmp_path, overwrite=True, inputs=())
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
