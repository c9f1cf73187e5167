"""The figures as images, drawn by the browser that is installed."""

import re

import pytest

from report.conftest import CHROMIUM
from report.made_files import make_run
from tokenratio.errors import TokenRatioError
from tokenratio.report.images import _for_paper, write_images
from tokenratio.report.run_report import build_report


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_every_figure_becomes_an_image(kind, tmp_path, monkeypatch):
    pytest.importorskip("kaleido")
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH")
    monkeypatch.setenv("BROWSER_PATH", CHROMIUM)
    report = build_report([make_run(tmp_path / "mine", own__a_and_b=lambda t: t)])
    paths = write_images(report.figures, tmp_path / "images", kind)
    assert [path.stem for path in paths] == [figure.name for figure in report.figures]
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == sorted(
        path.name for path in paths
    )
    for path, figure in zip(paths, report.figures, strict=True):
        content = path.read_bytes()
        if kind == "png":
            assert content.startswith(b"\x89PNG")
            width, height = (int.from_bytes(content[at : at + 4]) for at in (16, 20))
            assert (width, height) == (1520, 880)
        else:
            text = re.sub(r"<[^>]*>", "", content.decode())
            assert figure.title.replace("&", "&amp;") in text
            assert "step" in text


def test_tags_in_titles_are_not_plotlys(tmp_path):
    lines = [{"step": step, "loss": 0.5, "<b>own</b>": 0.1} for step in range(1, 9)]
    drawn = map(_for_paper, build_report([make_run(tmp_path / "mine", lines=lines)]).figures)
    titles = [figure["layout"]["title"]["text"] for figure in drawn]
    assert "&lt;b>own&lt;/b>" in titles


def test_runs_without_curves_have_no_images(tmp_path):
    run = make_run(tmp_path / "mine", lines=[])
    with pytest.raises(TokenRatioError, match="there is no figure to draw"):
        write_images(build_report([run]).figures, tmp_path / "images", "png")
