"""The shell of a page: what it may run, what it holds, and what cannot get out of it."""

import base64
import hashlib
import json
import os
import re
from html.parser import HTMLParser

import pytest

from tokenratio.errors import TokenRatioError
from tokenratio.report import page
from tokenratio.report.page import LARGEST_PAGE, embedded_json, render_page, write_page

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "</style><img src=x onerror=alert(1)>",
    "a\u2028b\u2029c\u202ed\u200b",
    "\ud800 half a pair",
    "'\"`&lt;${1}{{ 7 * 7 }}{% raw %}",
    "\x00\x01\x1b[2J",
]


class Elements(HTMLParser):
    """The elements of a page, with their text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.found, self._open = [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes), []))
        self._open = self.found[-1] if tag in ("script", "style") else None

    def handle_data(self, data):
        if self._open is not None:
            self._open[2].append(data)

    def handle_endtag(self, tag):
        self._open = None

    def texts(self, tag):
        return [(attributes, "".join(text)) for each, attributes, text in self.found if each == tag]


@pytest.fixture
def shell(monkeypatch):
    """Renders the shell alone, around a body."""

    def render(**given):
        given = {"title": "T", "data": {}, **given}
        return render_page("page.html.j2", **given)

    return render


def policy_of(text):
    for attributes, _ in Elements(text).texts("meta"):
        if attributes.get("http-equiv") == "Content-Security-Policy":
            rules = (rule.split() for rule in attributes["content"].split(";"))
            return {name: sources for name, *sources in rules}
    raise AssertionError("the page has no policy")


def digest(text):
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_only_what_the_page_holds_may_run(shell):
    text = shell(libraries=["const library = 1;\n"], data={"a": [1]})
    elements, policy = Elements(text), policy_of(text)
    scripts = [t for attributes, t in elements.texts("script") if "type" not in attributes]
    assert len(scripts) == 2
    assert policy["script-src"] == [digest(script) for script in scripts]
    styles = [digest(style) for _, style in elements.texts("style")]
    assert policy["style-src"] == [digest(""), *styles]
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == ["'none'"]
    assert "connect-src" not in policy
    assert "unsafe" not in str(policy)
    assert "http" not in str(policy).replace("http-equiv", "")


def test_a_live_page_may_ask_its_own_server(shell):
    assert policy_of(shell(live=True))["connect-src"] == ["'self'"]


def test_nothing_is_fetched_and_nothing_is_inline(shell):
    for _, attributes, _ in Elements(shell()).found:
        assert "src" not in attributes
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        assert not attributes.get("href", "#").startswith("http")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_data_stays_data(shell, text):
    value = {"text": [text], text: 1}
    found = shell(data={"pairs": value}, title=text)
    elements = Elements(found)
    (data,) = [t for attributes, t in elements.texts("script") if attributes.get("id")]
    assert json.loads(data) == value
    assert len(elements.texts("script")) == 2
    assert len(elements.texts("img")) == 0
    if "\ud800" not in text:
        found.encode()


def test_numbers_that_json_does_not_have_become_null():
    assert json.loads(embedded_json({"a": [1.0, float("nan")], "b": float("-inf")})) == {
        "a": [1.0, None],
        "b": None,
    }


def test_a_script_that_would_end_its_element_is_refused(shell):
    for script in ("a = '</SCRIPT>'", "a = '<!-- <script'"):
        with pytest.raises(ValueError, match="would end it"):
            shell(libraries=[script])


def test_a_value_that_the_template_lacks_is_an_error(shell, monkeypatch):
    from jinja2 import UndefinedError

    environment = page._environment()
    with pytest.raises(UndefinedError):
        environment.from_string("{{ missing }}").render()


def test_a_page_replaces_pages_alone(shell, tmp_path):
    path = tmp_path / "report.html"
    write_page(path, shell())
    write_page(path, shell(title="again"))
    assert "again" in path.read_text()
    other = tmp_path / "metrics.jsonl"
    other.write_text("{}\n")
    with pytest.raises(TokenRatioError, match=r"metrics.jsonl exists and is no report"):
        write_page(other, shell())
    assert other.read_text() == "{}\n"
    with pytest.raises(TokenRatioError, match="is a folder"):
        write_page(tmp_path, shell())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs")
def test_no_device_is_replaced_and_an_empty_file_is(shell, tmp_path):
    pipe, empty = tmp_path / "pipe", tmp_path / "empty"
    os.mkfifo(pipe)
    with pytest.raises(TokenRatioError, match="pipe is no regular file: choose another --output"):
        write_page(pipe, shell())
    assert pipe.is_fifo()
    empty.touch()
    write_page(empty, shell())
    assert empty.stat().st_size


def test_a_page_too_large_is_refused(shell, tmp_path):
    large = shell(data={"a": "x" * LARGEST_PAGE})
    with pytest.raises(TokenRatioError, match=r"would have 8.0 MB, more than 8 MB"):
        write_page(tmp_path / "a.html", large)
    assert not list(tmp_path.iterdir())


def test_every_colour_of_the_style_suits_both_themes():
    style = page.static_text("page.css")
    root = style[style.index(":root") : style.index("}")]
    colours = re.findall(r"--[\w-]+: (.*#.*);", root)
    assert len(colours) > 8
    assert all(re.fullmatch(r"light-dark\(#\w{6}, #\w{6}\)", each) for each in colours)
