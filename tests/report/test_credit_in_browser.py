"""The token-credit viewer in a browser: what a reader sees, does and cannot be harmed by."""

import json
import time

import pytest

from report.credit_cases import (
    HOSTILE,
    byte_tokenizer,
    hostile_pairs,
    long_inspection,
    save_policies,
    write_pairs,
)
from tiny import WORDS, tiny_tokenizer, word_pairs
from tokenratio import InspectOptions, TokenRatioError, inspect_pairs, write_credit_page
from tokenratio.report import credit_page

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A page of two policies on pairs of words, and its inspection."""
    folder = tmp_path_factory.mktemp("words")
    save_policies(folder, tiny_tokenizer())
    data = write_pairs(folder / "pairs.jsonl", word_pairs(30, seed=3, longest=20))
    options = InspectOptions(reference=str(folder / "reference"), data=str(data), max_length=18)
    models = [f"start={folder / 'reference'}", f"end={folder / 'policy'}"]
    found = inspect_pairs(models, options, report=lambda line: None)
    write_credit_page(found, folder / "credit.html")
    return folder / "credit.html", found


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    policy, reference = save_policies(folder, byte_tokenizer())
    data = write_pairs(folder / "pairs.jsonl", hostile_pairs())
    options = InspectOptions(reference=str(reference), data=str(data), losses=["dpo", "simpo"])
    found = inspect_pairs([policy], options, report=lambda line: None)
    write_credit_page(found, folder / "credit.html")
    return folder / "credit.html", found


TITLE = "text => document.querySelector('#pair-title').textContent === text"
HIDDEN = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200b\u200d\u2028\x07\x1b\x00"


def ready(page):
    page.wait_for_selector("#lanes .cell.active")
    return page


def text(page, selector):
    return page.locator(selector).inner_text()


def shown_value(page, name, column):
    """A figure of the detail box."""
    row = page.locator("#detail .values tr", has=page.locator("th", has_text=name))
    return row.first.locator("td").nth(column).inner_text().replace("−", "-")


def test_it_shows_the_figures_of_the_inspection(words, open_page):
    path, found = words
    page = ready(open_page(path, fragment="#pair=4&step=2&side=rejected&policy=end"))
    policy, pair = found.policies[1], found.pairs[4]
    assert text(page, "#pair-title") == "Pair 4"
    for number, side in enumerate(("chosen", "rejected")):
        cells = page.locator(f"#lanes button.{side} bdi").all_inner_texts()
        assert cells == [token.text for token in getattr(pair, side).tokens]
        rho = policy.sides[number][4].log_ratio[2]
        assert float(shown_value(page, "ρ", number)) == pytest.approx(rho, abs=6e-4)
        ref = policy.sides[number][4].ref_log_probs[2]
        assert float(shown_value(page, "log π_ref", number)) == pytest.approx(ref, abs=6e-3)
    log_r = policy.methods[0].steps["pair_log_ratio"][4, 2]
    assert float(shown_value(page, "log R", 0)) == pytest.approx(float(log_r), abs=6e-4)
    likely = page.locator("#detail .likely").first.locator("td.token").all_inner_texts()
    assert len(likely) >= 5
    assert set(likely) <= {"<pad>", "<bos>", "<eos>", "<unk>", *WORDS}


def test_switches_of_metric_method_policy_and_layout(words, open_page):
    path, _ = words
    page = ready(open_page(path))
    assert page.locator("#policy").input_value() == "1"
    before = text(page, "#detail .values")
    page.select_option("#policy", label="start")
    changed = "before => document.querySelector('#detail .values').innerText !== before"
    page.wait_for_function(changed, arg=before)
    assert shown_value(page, "ρ", 0) == "0"  # the reference against itself
    page.select_option("#policy", label="end")
    page.select_option("#metric", "log_r")
    assert "log R" in text(page, "#legend")
    page.select_option("#method", label="dpo (beta 0.1)")
    assert "loss" not in page.locator("#metric").inner_text()  # DPO has none of single steps
    assert page.locator("#lanes .unseen").count() == 0
    page.select_option("#method", label="tbpo_a (beta 0.1)")
    page.select_option("#metric", "loss")
    page.select_option("#method", label="tdpo1 (beta 0.1)")
    assert page.locator("#metric").input_value() == "rho"
    page.select_option("#layout", "text")
    assert page.locator("#lanes .run").count() == 2
    page.check("#spaces")
    assert "layout=text" in page.url


def test_the_list_sorts_filters_and_searches(words, open_page):
    path, found = words
    page = ready(open_page(path))
    margins = [a - b for a, b in (found.policies[1].rewards(i, 0.1) for i in range(30))]

    def column(number):
        cells = page.locator(f"#pairs tbody td:nth-child({number})").all_inner_texts()
        return [float(cell.replace("−", "-")) for cell in cells]

    page.click("#pairs th:nth-child(3) button")
    assert column(3) == sorted(column(3), reverse=True)
    page.click("#pairs th:nth-child(3) button")
    assert column(3) == sorted(column(3))
    assert page.get_attribute("#pairs th:nth-child(3)", "aria-sort") == "ascending"
    page.select_option("#filter", "wrong")
    assert len(column(1)) == sum(margin < 0 for margin in margins)
    page.select_option("#filter", "truncated")
    cut = [i for i, pair in enumerate(found.pairs) if pair.chosen.cut or pair.rejected.cut]
    assert sorted(column(1)) == cut
    page.select_option("#filter", "all")
    wanted = found.pairs[7].chosen.tokens[0].text
    page.fill("#search", wanted)
    page.wait_for_function("() => document.querySelector('#list-count').textContent.includes('of')")
    having = [
        index
        for index, pair in enumerate(found.pairs)
        if any(wanted in part for part in (
            pair.prompt,
            "".join(token.text for token in pair.chosen.tokens),
            "".join(token.text for token in pair.rejected.tokens),
        ))
    ]  # fmt: skip
    assert sorted(column(1)) == having
    page.click("#pairs tbody tr:nth-child(2) .open")
    opened = page.locator("#pairs tr.current td").first.inner_text()
    page.wait_for_function(TITLE, arg=f"Pair {opened}")


def test_keys_and_hover(words, open_page):
    path, found = words
    page = ready(open_page(path, fragment="#pair=2"))
    # Outside the lanes these keys scroll.
    page.keyboard.press("End")
    page.keyboard.press("ArrowDown")
    assert text(page, "#detail h3").startswith("Step 0")
    assert page.locator("#lanes .active").get_attribute("data-side") == "chosen"
    page.wait_for_function("() => scrollY > 0")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert text(page, "#detail h3").startswith("Step 2")
    active = page.evaluate("() => ({...document.activeElement.dataset})")
    assert active == {"side": "rejected", "step": "2"}
    page.keyboard.press("Home")
    assert text(page, "#detail h3").startswith("Step 0")
    page.keyboard.press("End")
    longest = max(len(found.pairs[2].chosen), len(found.pairs[2].rejected))
    assert text(page, "#detail h3").startswith(f"Step {longest - 1}")
    page.hover("#lanes button.chosen[data-step='1']")
    assert text(page, "#detail h3").startswith("Step 1")
    page.mouse.move(5, 5)
    assert text(page, "#detail h3").startswith(f"Step {longest - 1}")
    page.keyboard.press("j")
    page.wait_for_function(TITLE, arg="Pair 3")
    page.keyboard.press("k")
    page.wait_for_function(TITLE, arg="Pair 2")
    page.keyboard.press("m")
    assert page.locator("#metric").input_value() == "log_r"
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    assert page.evaluate("() => document.activeElement.id") == "search"


def test_a_deep_link_survives_a_reload(words, open_page):
    path, _ = words
    fragment = "#pair=17&metric=kl&step=3&side=rejected&method=dpo&policy=start&sort=-margin"
    page = ready(open_page(path, fragment=fragment))

    def state():
        return (
            text(page, "#pair-title"),
            page.locator("#metric").input_value(),
            page.locator("#method").input_value(),
            page.locator("#policy").input_value(),
            page.locator("#lanes .active").get_attribute("data-step"),
            page.locator("#lanes .active").get_attribute("data-side"),
            page.get_attribute("#pairs th:nth-child(3)", "aria-sort"),
        )

    before = state()
    assert before == ("Pair 17", "kl", "2", "0", "3", "rejected", "descending")
    page.reload()
    ready(page)
    assert state() == before
    page.select_option("#filter", "tail")
    page.select_option("#layout", "text")
    page.evaluate("() => { location.hash = '#pair=5&step=1'; }")
    page.wait_for_function(TITLE, arg="Pair 5")
    # What an address leaves out is as at first, not as it was.
    assert page.locator("#filter").input_value() == "all"
    assert page.locator("#layout").input_value() == "aligned"
    assert page.get_attribute("#pairs th:nth-child(3)", "aria-sort") is None
    shared = words[1].pairs[5].num_shared
    assert text(page, "#detail h3").endswith(f"both responses have steps 0 to {shared - 1}")


def test_the_boundary_is_before_the_first_step_of_the_tail(words, open_page):
    path, found = words
    index = next(i for i, pair in enumerate(found.pairs) if len(pair.chosen) != len(pair.rejected))
    page = ready(open_page(path, fragment=f"#pair={index}"))
    mark = page.locator("#lanes .boundary")
    shared = found.pairs[index].num_shared
    assert mark.get_attribute("title") == f"From step {shared} on only one response has tokens"
    after = mark.evaluate(
        "e => Number(e.nextElementSibling.querySelector('.cell[data-step]').dataset.step)"
    )
    assert after == shared


@pytest.mark.parametrize(
    "fragment", ["#pair=-1", "#pair=9999&metric=none&step=x", "#%", "#pair=<b>"]
)
def test_an_address_that_means_nothing_opens_the_first_pair(fragment, words, open_page):
    page = ready(open_page(words[0], fragment=fragment))
    assert text(page, "#pair-title") == "Pair 0"


def test_hostile_texts_are_shown_and_do_nothing(hostile, open_page):
    path, found = hostile
    page = ready(open_page(path))
    assert page.title().startswith("Token credit")
    assert page.locator("img, main script, main style").count() == 0
    names = [*HOSTILE, "long"]
    by_name = {pair.prompt.partition(":")[0]: index for index, pair in enumerate(found.pairs)}
    for name in names:
        page.evaluate("n => { location.hash = `#pair=${n}`; }", by_name[name])
        page.wait_for_function(TITLE, arg=f"Pair {by_name[name]}")
        for layout in ("aligned", "text"):
            page.select_option("#layout", layout)
            shown = page.locator("#lanes").evaluate("box => box.textContent")
            for bad in HIDDEN:
                assert bad not in shown, (name, bad)
    assert page.title().startswith("Token credit")
    page.evaluate("n => { location.hash = `#pair=${n}`; }", by_name["bidi"])
    page.wait_for_function("() => document.querySelector('#lanes').textContent.includes('U+202E')")
    # Isolated, so that a token cannot reorder its neighbours.
    page.select_option("#layout", "aligned")
    assert (
        page.locator("#lanes bdi").first.evaluate("e => getComputedStyle(e).unicodeBidi")
        == "isolate"
    )


def test_a_token_of_ten_thousand_characters_is_cut_in_its_cell(hostile, open_page):
    path, found = hostile
    index = next(i for i, pair in enumerate(found.pairs) if pair.prompt == "long")
    step = next(
        t for t, token in enumerate(found.pairs[index].chosen.tokens) if len(token.text) > 999
    )
    page = ready(open_page(path, fragment=f"#pair={index}&step={step}"))
    cell = page.locator(f"#lanes button.chosen[data-step='{step}']")
    assert cell.inner_text().endswith("…+9,960")
    assert cell.bounding_box()["width"] < 900
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing_serious(dark, width, words, hostile, open_page, check_accessible):
    for path, _ in (words, hostile):
        page = ready(open_page(path, width=width, dark=dark))
        check_accessible(page)
        assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
        page.select_option("#layout", "text")
        page.evaluate(
            "() => document.querySelectorAll('details').forEach((each) => { each.open = true; })"
        )
        check_accessible(page)


def test_the_theme_switch_is_remembered(words, open_page):
    page = ready(open_page(words[0]))
    colour = "() => getComputedStyle(document.documentElement).backgroundColor"
    light = page.evaluate(colour)
    page.click("#theme")
    page.click("#theme")
    assert page.evaluate(colour) != light
    page.reload()
    assert page.evaluate(colour) != light


def test_many_long_pairs_stay_fluid(tmp_path, open_page):
    """200 pairs of 512 tokens: printed here, and the largest figures that would still be fluid."""
    found = long_inspection(tmp_path, num_pairs=200, length=512)
    path = tmp_path / "credit.html"
    left_out = write_credit_page(found, path)
    size = path.stat().st_size
    began = time.perf_counter()
    page = ready(open_page(path))
    opened = time.perf_counter() - began
    paint = page.evaluate("() => performance.getEntriesByType('paint').at(-1).startTime")
    began = time.perf_counter()
    for _ in range(50):
        page.keyboard.press("ArrowRight")
    step = (time.perf_counter() - began) / 50
    began = time.perf_counter()
    for number in range(1, 21):
        page.keyboard.press("j")
        page.wait_for_function(TITLE, arg=f"Pair {number}")
    turn = (time.perf_counter() - began) / 20
    print(
        f"{size / 1e6:.1f} MB, {left_out}; first paint {paint:.0f} ms, first pair {opened:.2f} s, "
        f"a step {1e3 * step:.0f} ms, a pair {1e3 * turn:.0f} ms"
    )
    assert size <= credit_page.LARGEST_PAGE
    assert page.locator("#lanes .step").count() == 512
    assert opened < 20
    assert turn < 4


def test_what_does_not_fit_is_left_out_and_said(tmp_path, monkeypatch, open_page):
    found = long_inspection(tmp_path, num_pairs=6, length=40)
    write_credit_page(found, tmp_path / "whole.html")
    whole = (tmp_path / "whole.html").stat().st_size
    monkeypatch.setattr(credit_page, "LARGEST_PAGE", whole - 3000)
    notes = write_credit_page(found, tmp_path / "part.html")
    assert len(notes) == 1
    assert "of 6 pairs with the largest |margin|" in notes[0]
    assert (tmp_path / "part.html").stat().st_size <= whole - 3000
    margins = [abs(a - b) for a, b in (found.policies[0].rewards(i, 1.0) for i in range(6))]
    weakest = margins.index(min(margins))
    page = ready(open_page(tmp_path / "part.html", fragment=f"#pair={weakest}"))
    assert page.locator("#detail .likely").count() == 0
    assert page.locator("#detail .values").count() == 1
    monkeypatch.setattr(credit_page, "LARGEST_PAGE", 50_000)
    with pytest.raises(TokenRatioError, match=r"more than 0 MB: lower --num_pairs \(6\)"):
        write_credit_page(found, tmp_path / "none.html")


def test_values_that_are_not_finite_are_gaps(words, tmp_path, open_page):
    _, found = words
    values = found.policies[1].chosen[0]
    before = values.log_probs.copy()
    try:
        values.log_probs[1] = float("-inf")
        write_credit_page(found, tmp_path / "gaps.html")
        found.write_jsonl(tmp_path / "gaps.jsonl")
    finally:
        values.log_probs[:] = before
    page = ready(open_page(tmp_path / "gaps.html", fragment="#pair=0&step=1&policy=end"))
    assert shown_value(page, "ρ", 0) == "–"
    first = json.loads((tmp_path / "gaps.jsonl").read_text().splitlines()[30])
    assert first["chosen"]["log_probs"][1] is None
