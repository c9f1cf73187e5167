"""The report in Chromium: it draws, obeys its own policy, and follows a run in progress."""

import json
import threading

import pytest

from report.made_files import make_evaluation, make_run
from report.test_page import HOSTILE
from tokenratio.report.live import make_server
from tokenratio.report.run_report import write_report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Reports of one run, of several, and of hostile ones."""
    folder = tmp_path_factory.mktemp("files")
    one = make_run(folder / "mine", log_ratio__chosen=lambda t: -0.4 * t, steps=400)
    two = make_run(folder / "theirs", seed=1, config={"beta": 0.2})
    make_evaluation(folder / "evaluation", {"mine": (one, 0.5), "theirs": (two, 1.0)})
    write_report([one], folder / "one.html")
    write_report([one, two], folder / "several.html")
    hostile = [text for text in HOSTILE if "\ud800" not in text and "\x00" not in text]
    lines = [{"step": i, "loss": 0.5, **dict.fromkeys(hostile, 0.1)} for i in range(1, 20)]
    bad = make_run(folder / "bad", lines=lines, config={"run_name": " ".join(hostile)})
    long = "x" * 10_000
    make_evaluation(
        folder / "hostile",
        {"bad": (bad, 0.5)},
        prompts=[*hostile, "مرحبا بالعالم", "שלום עולם", "👩‍👩‍👧‍👦 e\u0301", long],
        answers=lambda name, id: f"{name} {hostile[int(id.partition(':')[2]) % len(hostile)]}",
    )
    write_report([bad, folder / "hostile"], folder / "hostile.html")
    return folder


def drawn(page):
    """The names of the figures that show curves."""
    page.locator("figure").first.scroll_into_view_if_needed()
    page.locator(".plot .main-svg").first.wait_for()
    return page.eval_on_selector_all(
        "figure", "all => all.filter(f => f.querySelector('.main-svg')).map(f => f.dataset.figure)"
    )


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["one", "several", "hostile"])
def test_it_opens_from_disk(name, width, dark, files, open_page, check_accessible):
    """Without an error or a request: those are the fixture's to notice."""
    page = open_page(files / f"{name}.html", width=width, dark=dark)
    assert len(drawn(page)) >= 1
    fits = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    assert page.evaluate(fits)
    check_accessible(page)


def test_curves_are_what_was_logged(files, open_page):
    page = open_page(files / "one.html")
    drawn(page)
    shown = page.evaluate(
        "document.querySelector('[data-figure=loss] .plot').data.map(t => [t.name, t.x.length])"
    )
    assert shown == [["training, each step", 400], ["training", 400], ["held out", 3]]


def test_each_step_can_be_hidden(files, open_page):
    page = open_page(files / "one.html")
    drawn(page)
    visible = "document.querySelector('[data-figure=loss] .plot').data[0].visible"
    assert page.evaluate(visible) is True
    page.get_by_label("every step behind the smoothed curve").uncheck()
    assert page.evaluate(visible) is False


def test_the_theme_is_switched_and_remembered(files, open_page):
    page = open_page(files / "one.html", dark=True)
    drawn(page)
    ink = "document.querySelector('[data-figure=loss] .plot').layout.font.color"
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    dark = page.evaluate(ink), page.evaluate(paper)
    page.get_by_role("button", name="Theme: as the system").click()
    page.get_by_role("button", name="Theme: light").wait_for()
    light = page.evaluate(ink), page.evaluate(paper)
    assert dark[0] != light[0]
    assert dark[1] != light[1]
    page.reload()
    page.get_by_role("button", name="Theme: light").wait_for()
    assert page.evaluate(paper) == light[1]


def test_hover_shows_the_values(files, open_page):
    page = open_page(files / "one.html")
    drawn(page)
    page.locator("[data-figure=loss] .plot .nsewdrag").first.hover()
    page.locator("[data-figure=loss] .hoverlayer text").first.wait_for()
    assert "training" in page.locator("[data-figure=loss] .hoverlayer").text_content()


def test_values_of_a_figure_are_a_table(files, open_page):
    page = open_page(files / "several.html")
    figure = page.locator("[data-figure=margin]")
    figure.get_by_text("Values").click()
    rows = figure.locator("tbody tr")
    assert rows.count() > 100
    head = figure.locator("thead th").all_inner_texts()
    assert head[0] == "step"
    assert head[1:3] == ["mine, each step", "theirs, each step"]
    first = rows.first.locator("td").all_inner_texts()
    line = json.loads((files / "mine" / "metrics.jsonl").read_text().splitlines()[0])
    assert float(first[1]) == pytest.approx(line["rewards/margins"], rel=1e-4)


def test_hostile_texts_run_nothing_and_are_read(files, open_page):
    page = open_page(files / "hostile.html")
    assert page.evaluate("document.querySelectorAll('img, iframe, object, embed').length") == 0
    text = page.locator("#answers").inner_text()
    assert "</script><script>alert(1)</script>" in text
    assert "مرحبا بالعالم" in text
    titles = page.locator("#more-curves figcaption").all_text_contents()
    assert "</style><img src=x onerror=alert(1)>" in titles


def test_a_watched_run_goes_on_without_a_reload(tmp_path, browser):
    run = make_run(tmp_path / "mine", steps=30, held_out=False)
    with make_server([str(run)], 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        context = browser.new_context()
        page = context.new_page()
        faults = []
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(f"http://127.0.0.1:{server.server_address[1]}/")
        drawn(page)
        page.evaluate("window.isTheSame = true")
        with (run / "metrics.jsonl").open("a") as file:
            for step in range(31, 61):
                file.write(json.dumps({"step": step, "loss": 0.1, "grad_norm": 1.0}) + "\n")
        page.get_by_text("60 steps").wait_for(timeout=20_000)
        assert page.evaluate("window.isTheSame") is True
        last = "document.querySelector('[data-figure=loss] .plot').data[0].x.at(-1)"
        assert page.evaluate(last) == 60
        server.shutdown()
        thread.join()
    page.get_by_text("the server has ended").wait_for(timeout=20_000)
    context.close()
    assert [fault for fault in faults if "ERR_CONNECTION_REFUSED" not in fault] == []
