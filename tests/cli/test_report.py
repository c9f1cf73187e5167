"""`tokenratio report` as it is typed."""

import pytest

from report.made_files import make_run
from tokenratio.cli.main import main


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "mine")
    return tmp_path


def test_the_page_is_written_and_its_path_printed(folder, capsys):
    assert main(["report", "mine"]) == 0
    assert capsys.readouterr().out == "report.html\n"
    assert (folder / "report.html").stat().st_size > 4_000_000
    assert main(["report", "mine", "--output", "a/b.html"]) == 0
    assert (folder / "a" / "b.html").is_file()


def test_markdown(folder, capsys):
    assert main(["report", "mine", "--format", "md"]) == 0
    assert capsys.readouterr().out == "report.md\n"
    assert (folder / "report.md").read_text().startswith("<!-- Written by tokenratio")
    assert main(["report", "mine", "--format", "md"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "none does not exist"),
        (["mine", "--output", "mine/run.json"], "mine/run.json exists and is no report"),
        (["mine", "--output", "mine"], "mine is a folder: give a file"),
        (["mine", "--format", "md", "--output", "mine/run.json"], "exists and is no report"),
        (["mine", "--format", "pdf"], "format must be one of html, md, png, svg, not 'pdf'"),
        (["mine", "--watch", "--output", "a.html"], "--watch writes no file"),
        (["mine", "--port", "70000"], "port must lie between 0 and 65535, not 70000"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_images_without_a_browser_say_what_to_install(folder, capsys, monkeypatch):
    import kaleido

    def fail(*args, **kwargs):
        raise kaleido.errors.ChromeNotFoundError("no Chrome")

    monkeypatch.setattr(kaleido, "write_fig_from_object_sync", fail)
    assert main(["report", "mine", "--format", "png"]) == 2
    assert "apt-get install chromium" in capsys.readouterr().err
