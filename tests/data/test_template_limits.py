"""What a chat template may not do: never end, fill the memory, or be replaced by a row."""

import inspect
import json
import threading
import time
from datetime import date

import pytest

from templates import chat_pair, family_tokenizer
from tokenratio import TokenRatioConfig
from tokenratio.cli.main import main
from tokenratio.data import DefectKind, inspect_source, prepare_pairs, template_limits
from tokenratio.data.defects import RowDefectError
from tokenratio.data.template import (
    RESERVED_ARGUMENTS,
    TemplateSettings,
    apply_template,
    with_chat_template,
)
from tokenratio.errors import TokenRatioError

TURNS = [{"role": "user", "content": "sky?"}]
DAY = TemplateSettings(day=date(2025, 3, 1))
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)
LONG = "{% for i in range(999) %}{{ 'a' * 1000 }}{% endfor %}"
POWER = "{% set x = 10 ** 10 ** 10 %}"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.3)
    monkeypatch.setattr(template_limits, "MAX_CHARACTERS", 500_000)


def render(template):
    tokenizer = with_chat_template(family_tokenizer("chatml"), template)
    tokenizer.name_or_path = "somebody/model"
    return apply_template(tokenizer, TURNS, DAY)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOP, "takes more than 0.3 s for one conversation"),
        (LONG, "writes 999,000 characters"),
        (POWER, r"uses the power operator \(\*\*\)"),
        ("{{ 'a' * 99999999999999999 }}", "takes more memory than there is"),
    ],
)
def test_a_template_that_does_not_end_is_named(template, message):
    began = time.perf_counter()
    with pytest.raises(TokenRatioError, match=f"chat template of somebody/model ({message})"):
        render(template)
    assert time.perf_counter() - began < 20
    assert render("{{ messages[0].content }}") == "sky?"


def test_a_template_that_fills_the_memory_is_stopped_early(monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 60)
    monkeypatch.setattr(template_limits, "MAX_BYTES", 2**28)
    with pytest.raises(TokenRatioError, match=r"takes more than 0.25 GiB of memory"):
        render(DOUBLING)


def test_it_is_stopped_in_any_thread_and_the_others_go_on():
    found = {}

    def work(name, template):
        try:
            found[name] = render(template)
        except TokenRatioError as error:
            found[name] = str(error)

    fine = "{{ messages[0].content }}"
    threads = [threading.Thread(target=work, args=pair) for pair in ((1, LOOP), (2, fine))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert "takes more than 0.3 s" in found[1]
    assert found[2] == "sky?"


def test_many_conversations_have_as_much_time_each():
    """What is rendered at an interval's end is another one than at its beginning."""
    end = time.perf_counter() + 0.7
    while time.perf_counter() < end:
        assert render("{{ messages[0].content }}") == "sky?"


@pytest.mark.parametrize("num_proc", [1, 2])
def test_preparing_data_stops_at_the_first_row(num_proc, monkeypatch):
    """Also where the template is fine until it meets a row, in a process of its own."""
    only_this = f"{{% if messages[0].content == 'sky?' %}}{LOOP}{{% endif %}}"
    tokenizer = family_tokenizer("chatml")
    tokenizer = with_chat_template(tokenizer, only_this + tokenizer.chat_template)
    rows = [chat_pair(f"{n}?", "blue", "green") for n in range(600)] + [chat_pair("sky?", "a", "b")]
    limits = {"max_length": None, "max_prompt_length": None, "num_proc": num_proc}
    with pytest.raises(TokenRatioError, match=r"takes more than 0.3 s"):
        prepare_pairs(rows, tokenizer, **limits)


def test_a_command_prints_one_line(tmp_path, capsys):
    tokenizer = with_chat_template(family_tokenizer("chatml"), LOOP)
    tokenizer.save_pretrained(tmp_path / "model")
    rows = tmp_path / "pairs.jsonl"
    rows.write_text(json.dumps(chat_pair("sky?", "blue", "green")) + "\n")
    assert main(["inspect-data", str(rows), "--tokenizer", str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"chat template of {tmp_path / 'model'} takes more than 0.3 s" in error


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("**{{ messages[0].content }}**", "**sky?**"),
        ("{% macro f() %}{{ kwargs.a }}{% endmacro %}{{ f(**{'a': 2}) }}", "2"),
        ("{% macro f(b) %}{{ kwargs.a }}{% endmacro %}{{ f(1, **{'a': 2}) }}", "2"),
        ("{# 2 ** 3 #}{{ '**' * 2 }}", "****"),
    ],
)
def test_two_stars_that_are_no_power_are_rendered(template, text):
    assert render(template) == text


# Arguments of the template.


def test_every_argument_of_transformers_is_reserved():
    tokenizer = family_tokenizer("chatml")
    arguments = set(inspect.signature(tokenizer.apply_chat_template).parameters)
    # Documents are for the template alone.
    assert arguments - {"kwargs", "documents"} <= RESERVED_ARGUMENTS


@pytest.mark.parametrize(
    "kwargs",
    [
        {"chat_template": "{{ 'pwned' }}"},
        {"tokenize": True},
        {"add_generation_prompt": False},
        {"messages": []},
        {"tools": []},
        {"continue_final_message": True},
        {"strftime_now": "x"},
    ],
    ids=str,
)
def test_a_row_cannot_replace_the_template(kwargs):
    rows = [chat_pair("sky?", "blue", "green"), chat_pair("sea?", "blue", "green")]
    rows[1]["chat_template_kwargs"] = kwargs
    tokenizer = family_tokenizer("chatml")
    data = prepare_pairs(rows, tokenizer, max_length=None, max_prompt_length=None)
    assert len(data.dataset) == 1
    (name,) = kwargs
    assert f"chat_template_kwargs must not have {name}" in inspect_source(rows, tokenizer)
    (defect,) = data.report.defects
    assert defect.kind is DefectKind.MALFORMED_ROW
    with pytest.raises(TokenRatioError, match=f"chat_template_kwargs must not have {name}"):
        TokenRatioConfig(output_dir="x", use_cpu=True, chat_template_kwargs=kwargs)


def test_other_arguments_reach_the_template():
    row = chat_pair("sky?", "blue", "green")
    row["chat_template_kwargs"] = {"documents": [{"title": "a", "text": "b"}], "mood": "mild"}
    tokenizer = family_tokenizer("chatml")
    template = "{{ mood }} {{ documents[0].title }} " + tokenizer.chat_template
    tokenizer = with_chat_template(tokenizer, template)
    data = prepare_pairs([row], tokenizer, max_length=None, max_prompt_length=None)
    assert "mild a" in tokenizer.decode(data.dataset[0]["prompt_ids"])


@pytest.mark.parametrize(
    "expression",
    [
        "cycler.__init__.__globals__.os.system('touch PWNED')",
        "namespace.__init__.__globals__['os'].system('touch PWNED')",
        "''.__class__.__mro__[1].__subclasses__()[0]",
        "raise_exception.__globals__['os']",
        "(messages | attr('__class__')).__base__",
        "'{0.__class__.__init__.__globals__}'.format(messages)",
        "messages.append(1)",
    ],
)
def test_a_template_does_not_leave_its_sandbox(expression, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RowDefectError, match=r"SecurityError|UndefinedError"):
        render(f"{{{{ {expression} }}}}")
    assert not list(tmp_path.iterdir())
