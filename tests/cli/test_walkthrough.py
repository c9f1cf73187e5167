"""What `quickstart` and `demo` share: which losses they take, and which folders they replace."""

import sys
import warnings

import pytest

from report.made_files import make_run
from tokenratio.cli.main import main
from tokenratio.cli.terminal import quiet_libraries
from tokenratio.cli.walkthrough import alone_in, check_loss, claim, report_step
from tokenratio.errors import TokenRatioError
from tokenratio.run_folder import replace_text

OPTIONS = {}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of an earlier call."""
    monkeypatch.setattr("tokenratio.cli.walkthrough.asdict", dict)
    folder = tmp_path / "demo"
    claim(folder, "demo", OPTIONS, written=["answers.md"])
    for name in ("answers.md", "dpo/config.json", "pairs.jsonl"):
        replace_text(folder / name, "old")
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["tis_dpo", "sepo", "t_reg", "sft"])
def test_a_known_loss_that_takes_a_recipe_says_which(name, capsys):
    assert main(["demo", "--loss", name]) == 2
    assert f"recipes/methods/{name}.yaml" in capsys.readouterr().err


def test_an_unknown_loss_is_told_the_near_ones():
    check_loss("simpo")
    with pytest.raises(TokenRatioError, match="unknown loss 'smipo'; did you mean 'simpo'"):
        check_loss("smipo")


@pytest.mark.parametrize("command", ["demo", "quickstart"])
def test_a_seed_that_numpy_refuses(command, capsys):
    for seed in ("-1", "4294967296"):
        assert main([command, "--seed", seed]) == 2
        assert f"seed must lie between 0 and 2^32 - 1, not {seed}" in capsys.readouterr().err


def test_the_earlier_folder_is_replaced_also_through_a_link(folder, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(folder)
    claim(link, "demo", OPTIONS, written=["answers.md"])
    assert link.is_symlink()
    assert names(folder) == ["demo.json"]


def test_what_an_interruption_leaves_is_replaced(folder, monkeypatch):
    """The file that marks the folder goes last."""

    def stop(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tokenratio.cli.walkthrough.shutil.rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            claim(folder, "demo", OPTIONS, written=["answers.md"])
    assert "demo.json" in names(folder)
    claim(folder, "demo", OPTIONS, written=["answers.md"])
    assert names(folder) == ["demo.json"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "demo"):
        with pytest.raises(TokenRatioError, match="file is a file"):
            alone_in(folder).__enter__()


def test_the_model_to_start_from_is_not_removed(folder):
    before = names(folder)
    with pytest.raises(TokenRatioError, match=r"dpo is in .*demo, which demo replaces"):
        claim(folder, "demo", OPTIONS, written=["answers.md"], model=str(folder / "dpo"))
    assert names(folder) == before
    claim(folder, "demo", OPTIONS, written=["answers.md"], model="package:smollm2")


def test_a_users_terminal_shows_no_warning_between_libraries():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet_libraries()
        text = "`is_gradient_checkpointing` is deprecated and will be removed in v6."
        warnings.warn(text, FutureWarning, stacklevel=1)
        warnings.warn("something else", FutureWarning, stacklevel=1)
    assert [str(each.message) for each in seen] == ["something else"]


def test_a_walkthrough_ends_with_its_report(tmp_path, capsys, monkeypatch):
    make_run(tmp_path / "dpo")
    report_step(tmp_path, "dpo")
    assert capsys.readouterr().out == f"report: {tmp_path / 'report.html'}\n"
    assert "tokenratio" in (tmp_path / "report.html").read_text()
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    report_step(tmp_path, "dpo")
    assert "no report: the report's figures need plotly: pip install" in capsys.readouterr().out
