"""Help and usage errors come at once: torch and transformers take seconds to import."""

import json
import subprocess
import sys
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytest
from peft import LoraConfig
from transformers import TrainingArguments

import tokenratio
from tokenratio.cli import declared
from tokenratio.cli.declared import declared_fields
from tokenratio.cli.main import COMMANDS, main
from tokenratio.cli.recipe import Recipe, recipe_fields
from tokenratio.cli.score_tokens import ScoreOptions
from tokenratio.cli.train_reward import reward_fields
from tokenratio.cli.training_headings import TRAINING_HEADINGS
from tokenratio.data.contrast import PLACE
from tokenratio.losses import METHODS
from tokenratio.settings import fields_of
from tokenratio.training.config import TokenRatioConfig
from tokenratio.training.method_settings import METHOD_NAMES
from tokenratio.training.reward_trainer import RewardConfig

# What the child process runs: each command line, its exit code and output, the modules it loaded.
CHILD = """
import contextlib, io, json, sys
from tokenratio.cli.main import main
report = []
for argv in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    heavy = sorted({"torch", "transformers", "datasets", "peft", "scipy"} & sys.modules.keys())
    report.append([code, out.getvalue(), err.getvalue(), heavy])
print(json.dumps(report))
"""
MISTAKES = [
    (["trian"], "unknown command 'trian'; did you mean 'train'?"),
    (["train"], "needs one recipe"),
    (["train", "a.yaml", "b.yaml"], "needs one recipe"),
    (["train", "none.yaml"], "cannot read none.yaml: No such file or directory"),
    (["train", "wrong.yaml"], "unknown key in wrong.yaml 'learning_rat'"),
    (["train", "right.yaml", "--bta", "1"], "unknown flag 'bta'; did you mean 'beta'?"),
    (["train", "right.yaml", "--sft", "{max_leng: 3}"], "unknown key in sft of right.yaml"),
    (["train", "right.yaml", "--peft", "{lora_r: 3}"], "peft of right.yaml 'lora_r': use r"),
    (["train", "right.yaml", "--loss_type", "sigmoid"], "'loss_type': use loss: dpo"),
    (["train", "list.yaml"], "must hold `key: value` lines"),
    (["train", "right.yaml", "--beta"], "--beta needs a value"),
    (["train-reward", "right.yaml", "--learning_rat", "1"], "did you mean 'learning_rate'?"),
    (["evaluate", "none.yaml"], "cannot read none.yaml"),
    (["quickstart", "--sed", "1"], "did you mean 'seed'?"),
    (["methods", "dpo"], "takes no argument"),
    *(([name], "needs") for name in ("judge", "convert", "compare", "report", "inspect-data")),
    *(([name, "--no_such_flag"], "unknown flag") for name in COMMANDS),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each command line printed in a process that starts without torch."""
    folder = tmp_path_factory.mktemp("answers")
    (folder / "wrong.yaml").write_text("{model: m, train_dataset: d, learning_rat: 1}")
    (folder / "right.yaml").write_text("{model: m, train_dataset: d}")
    (folder / "list.yaml").write_text("[model, m]")
    lines = [*([name, "--help"] for name in COMMANDS), *(argv for argv, _ in MISTAKES)]
    result = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(lines)],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
    )
    return {
        tuple(argv): printed for argv, printed in zip(lines, json.loads(result.stdout), strict=True)
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_no_framework(name, answers):
    code, out, _, heavy = answers[name, "--help"]
    assert code == 0
    assert out.startswith(f"usage: tokenratio {name}")
    assert heavy == []


@pytest.mark.parametrize(("argv", "message"), MISTAKES, ids=lambda v: "_".join(v)[:40])
def test_usage_errors_need_no_framework(argv, message, answers):
    code, out, err, heavy = answers[tuple(argv)]
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert heavy == []


@pytest.mark.parametrize(
    ("module", "cls"),
    [
        ("tokenratio.training.config", TokenRatioConfig),
        ("tokenratio.training.reward_trainer", RewardConfig),
        ("transformers.training_args", TrainingArguments),
        ("peft.tuners.lora.config", LoraConfig),
    ],
)
def test_declared_fields_are_the_classs(module, cls):
    """Names in their order, defaults and help as dataclasses know them; enumerations as text."""
    real = fields_of(cls)
    found = declared._declared(module, cls.__name__)  # without the way out of importing the module
    assert list(found) == list(real)
    for name, field in real.items():
        assert (found[name].default, found[name].help) == (field.default, field.help), name
        assert kinds(found[name].hint) == kinds(field.hint), name


def kinds(hint: Any) -> set[str]:
    """What values a type admits, as `convert` tells them apart; other classes are given as text."""
    if get_origin(hint) in (Union, UnionType):
        return set().union(*map(kinds, get_args(hint)))
    origin = get_origin(hint) or hint
    known = (bool, int, float, list, dict, type(None))
    return {origin.__name__ if origin in known else "str"}


def test_a_source_that_cannot_be_read_is_imported_instead(tmp_path, monkeypatch):
    (tmp_path / "dynamic").mkdir()
    (tmp_path / "dynamic" / "__init__.py").write_text("")
    (tmp_path / "dynamic" / "settings.py").write_text(
        "from dataclasses import dataclass, field\n"
        "@dataclass\nclass Base:\n    a: int = 1\n"
        "@dataclass\nclass Computed(Base):\n    b: int = field(default=sum([1, 2]))\n"
        "@dataclass\nclass Literal(Base):\n    b: bool = field(default=True)\n    a: int = 5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    literal = declared_fields("dynamic.settings", "Literal")
    assert {name: field.default for name, field in literal.items()} == {"a": "5", "b": "True"}
    assert "dynamic.settings" not in sys.modules
    computed = declared_fields("dynamic.settings", "Computed")
    assert {name: field.default for name, field in computed.items()} == {"a": "1", "b": "3"}
    assert "dynamic.settings" in sys.modules


def test_recipe_fields_are_those_of_the_classes_the_common_ones_first():
    assert set(fields_of(TokenRatioConfig)) | set(fields_of(Recipe)) == set(recipe_fields())
    order = list(recipe_fields())
    assert order[0] == "model"
    assert order.index("train_dataset") < order.index("loss") < order.index("learning_rate")


def test_help_of_training_lists_our_own_settings_and_on_demand_all(capsys):
    listed = [name for names in TRAINING_HEADINGS.values() for name in names]
    assert len(listed) == len(set(listed))
    assert set(listed) <= set(recipe_fields())
    own = (set(recipe_fields()) | set(reward_fields())) - set(fields_of(TrainingArguments))
    assert own <= set(listed)
    for command, fields in (("train", recipe_fields()), ("train-reward", reward_fields())):
        assert main([command, "--help"]) == 0
        shown = capsys.readouterr().out
        found = [line.split()[0][2:] for line in shown.splitlines() if line.startswith("  --")]
        assert found == [name for name in listed if name in fields]
        assert shown.index("\nModel:\n") < shown.index("\nData:\n")
        assert f"{len(fields) - len(found)} more settings of transformers" in shown
        assert main([command, "--help", "all"]) == 0
        shown = capsys.readouterr().out
        assert all(f"\n  --{name}" in shown for name in fields)


def test_names_kept_for_help_are_the_librarys():
    assert tuple(METHODS) == METHOD_NAMES
    assert ScoreOptions.positive_prompt == PLACE


def test_python_m_tokenratio(tmp_path):
    command = [sys.executable, "-m", "tokenratio"]
    shown = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout == f"tokenratio {tokenratio.__version__}\n"
    wrong = subprocess.run([*command, "trian"], capture_output=True, text=True, cwd=tmp_path)
    assert wrong.returncode == 2
    assert "did you mean 'train'" in wrong.stderr


def test_help_of_the_program_lists_all_commands(capsys):
    for argv, expected in ((["help"], 0), (["--help"], 0), (["-h"], 0), ([], 2)):
        assert main(argv) == expected
        shown = capsys.readouterr().out
        assert all(f"\n  {name} " in shown for name in COMMANDS)
