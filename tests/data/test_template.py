"""What a template does with a row: its end of turn, its day, its arguments, what it leaves out."""

from datetime import date, datetime

import pytest

from templates import FAMILIES, chat_pair, family_tokenizer
from tokenratio.data import DefectKind, WarningKind, inspect_source, prepare_pairs
from tokenratio.data.chat import Conversation, prompt_value, render_prompt
from tokenratio.data.template import (
    TemplateSettings,
    apply_template,
    default_system_prompt,
    depends_on_day,
    turn_end,
    with_chat_template,
)
from tokenratio.errors import TokenRatioError
from tokenratio.models.generation import encode_prompts

DAY = TemplateSettings(day=date(2025, 3, 1))
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Tells the sky."}}


def prepare(rows, tokenizer, **more):
    return prepare_pairs(rows, tokenizer, max_length=None, max_prompt_length=None, **more)


def texts(prepared, tokenizer, row=0):
    found = prepared.dataset[row]
    return {name[:-4]: tokenizer.decode(found[name]) for name in found if name.endswith("_ids")}


# The system prompt.

SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nBe SmolLM.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALWAYS = SMOLLM2.replace("loop.first and messages[0]['role'] != 'system'", "loop.first")
TWICE = SMOLLM2.replace(
    "{{ m['content'] }}",
    "{{ m['content'] }}{% if m['role'] == 'user' and messages[0]['role'] == 'system' %}"
    " {{ messages[0]['content'] }}{% endif %}",
)


def with_system(content):
    row = chat_pair("sky?", "blue", "green")
    row["prompt"].insert(0, {"role": "system", "content": content})
    return row


def test_a_default_system_prompt_is_not_put_before_a_response_too():
    """As it would be if the response were rendered alone; before a given one there is none."""
    tokenizer = with_chat_template(family_tokenizer("chatml"), SMOLLM2)
    data = prepare([chat_pair("sky?", "blue", "green"), with_system("Be brief.")], tokenizer)
    for row, own in enumerate(("Be SmolLM.", "Be brief.")):
        shown = texts(data, tokenizer, row)
        assert (shown["prompt"] + shown["chosen"]).count("system\n") == 1
        assert f"system\n{own}<|im_end|>" in shown["prompt"]
    assert not [note for note in data.report.notes if "system" in note]


def test_a_system_prompt_of_the_template_before_that_of_a_row_is_reported():
    tokenizer = with_chat_template(family_tokenizer("chatml"), ALWAYS)
    (note,) = [n for n in prepare([with_system("Be brief.")], tokenizer).report.notes if "own" in n]
    assert "a system prompt of its own before that of a row" in note
    assert "Be SmolLM." in note
    without = prepare([chat_pair("sky?", "blue", "green")], tokenizer)
    assert not [note for note in without.report.notes if "own" in note]


def test_a_template_that_writes_the_system_prompt_twice_is_refused():
    tokenizer = with_chat_template(family_tokenizer("chatml"), TWICE)
    prepare([chat_pair("sky?", "blue", "green")], tokenizer)
    with pytest.raises(TokenRatioError, match="writes a conversation's system prompt twice"):
        prepare([with_system("Be brief.")], tokenizer)
    with pytest.raises(TokenRatioError, match="writes a conversation's system prompt twice"):
        encode_prompts(tokenizer, [with_system("Be brief.")["prompt"]])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_of_the_known_templates_only_one_writes_a_system_turn_of_its_own(family):
    own = default_system_prompt(family_tokenizer(family), DAY)
    assert ("Metadata" in own) if family == "smollm3" else (own is None)


# The end of a turn.


@pytest.mark.parametrize(
    ("family", "ending"),
    [
        ("chatml", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("gemma", "<end_of_turn>"),
        ("phi3", "<|end|>"),
        ("command", " <|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        ("qwen3", "<|im_end|>"),
        ("hermes", "<|im_end|>"),
        ("strips", "<|end|>"),
        ("bare", "\n\n</s>"),  # the template has none: EOS is appended
    ],
)
def test_a_response_ends_where_the_template_ends_the_turn(family, ending):
    tokenizer = family_tokenizer(family)
    shown = texts(prepare([chat_pair("sky?", "blue", "green")], tokenizer), tokenizer)
    opening = "<think>\n\n</think>\n\n" if family == "qwen3" else ""
    assert shown["chosen"] == f"{opening}blue{ending}"
    assert shown["rejected"] == f"{opening}green{ending}"


@pytest.mark.parametrize("family", ["gemma", "phi3", "chatml"])
def test_an_end_that_the_content_holds_is_not_doubled(family):
    tokenizer = family_tokenizer(family)
    end = turn_end(tokenizer, DAY)
    for content in (f"blue{end.token}", f"blue{tokenizer.eos_token}", f"blue{end.token}" * 2):
        prepared = prepare([chat_pair("sky?", content, "green")], tokenizer)
        chosen = texts(prepared, tokenizer)["chosen"]
        assert chosen.endswith(f"blue{end.token}")
        assert not chosen.endswith(end.token * 2)
        assert WarningKind.TEMPLATE_OMISSION not in prepared.report.warning_counts


def test_a_cut_response_has_no_end_and_a_text_keeps_eos():
    tokenizer = family_tokenizer("gemma")
    prompt_length = len(prepare([chat_pair("a", "b", "c")], tokenizer).dataset[0]["prompt_ids"])
    cut = prepare_pairs(
        [chat_pair("a", "bcdef", "c")],
        tokenizer,
        max_length=prompt_length + 5,
        max_prompt_length=None,
    )
    assert texts(cut, tokenizer)["chosen"] == "bcdef"
    text = prepare([{"prompt": "a", "chosen": "b", "rejected": "c"}], tokenizer)
    assert texts(text, tokenizer)["chosen"] == "b<eos>"
    assert text.turn_end is None
    assert not text.report.notes


def test_a_response_of_several_turns_ends_once_and_is_warned_of():
    tokenizer = family_tokenizer("gemma")
    row = chat_pair("sky?", "blue", "green")
    row["chosen"].append({"role": "assistant", "content": "or grey"})
    prepared = prepare([row], tokenizer)
    assert texts(prepared, tokenizer)["chosen"] == (
        "blue<end_of_turn>\n<start_of_turn>assistant\nor grey<end_of_turn>"
    )
    (inside,) = (w for w in prepared.report.warnings if w.kind is WarningKind.EOS_INSIDE_RESPONSE)
    assert inside.detail == "the response continues after '<end_of_turn>'"


def test_the_report_says_which_end_counts():
    tokenizer = family_tokenizer("gemma")
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    rows = [chat_pair("sky?", "blue", "green")]
    shown = inspect_source(rows, tokenizer, generation_ends=[tokenizer.eos_token_id])
    assert "'<end_of_turn>' once: 'blue<end_of_turn>'" in shown
    assert "end of a response: '<end_of_turn>', the chat template's end of turn, not" in shown
    assert f"eos_token_id of generation_config is '<eos>' ({tokenizer.eos_token_id})" in shown
    assert f"add {end} to eos_token_id" in shown
    assert "eos_token is '<eos>'" in inspect_source(rows, tokenizer)
    assert "add" not in inspect_source(rows, tokenizer, generation_ends=[1, end])
    chatml = inspect_source(rows, family_tokenizer("chatml"))
    assert "EOS once" in chatml
    assert "end of a response" not in chatml
    assert "writes no end of turn" in inspect_source(rows, family_tokenizer("bare"))


# The day.


@pytest.mark.parametrize(
    "format",
    ["%d %b %Y", "%Y-%m-%d", "%A, %B %-d, %Y", "%H:%M", "%j of 100%% %y", "no directive", "%x %p"],
)
def test_the_template_reads_the_day_it_is_told(format):
    tokenizer = family_tokenizer("chatml")
    template = f"  \n{{% set now = strftime_now('{format}') %}}\n [{{{{ now }}}}]"
    tokenizer.chat_template = template
    user = [{"role": "user", "content": "a"}]
    for day in (date(2025, 3, 1), date(1999, 12, 31)):
        written = datetime(day.year, day.month, day.day).strftime(format)
        expected = tokenizer.apply_chat_template(
            user, tokenize=False, chat_template=template.replace("strftime_now('", "('")
        ).replace(format, written)
        assert apply_template(tokenizer, user, TemplateSettings(day=day)) == expected
    assert depends_on_day(tokenizer, DAY) == (format not in ("no directive", "%H:%M", "%x %p")) or (
        format == "%x %p"
    )


def test_only_a_template_that_writes_the_day_depends_on_it():
    dated = family_tokenizer("dated")
    assert depends_on_day(dated, DAY)
    assert DAY.record(dated) == {"template_date": "2025-03-01"}
    assert DAY.record(family_tokenizer("chatml")) == {}
    # as in Llama 3.1, where an argument takes the place of the clock
    dated.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d') %}{% endif %}"
        "{{ date_string }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    assert depends_on_day(dated, DAY)
    assert not depends_on_day(dated, TemplateSettings({"date_string": "26 Jul 2024"}))
    # written only where there are tools
    dated.chat_template = (
        "{% if tools %}{{ strftime_now('%d') }}{% endif %}{{ messages[0].content }}"
    )
    assert depends_on_day(dated, DAY)


def test_rows_are_the_same_whenever_they_are_prepared():
    tokenizer = family_tokenizer("dated")
    rows = [chat_pair("sky?", "blue", "green")]
    first, again = (prepare(rows, tokenizer, template=DAY) for _ in range(2))
    other = prepare(rows, tokenizer, template=TemplateSettings(day=date(2025, 3, 2)))
    assert first.digest == again.digest != other.digest
    assert first.template == {"template_date": "2025-03-01"}
    assert "Today Date: 01 Mar 2025" in texts(first, tokenizer)["prompt"]
    assert "the template writes today's date (strftime_now): fixed to 2025-03-01" in (
        first.report.summary()
    )
    assert "date" not in prepare(rows, family_tokenizer("llama3")).report.summary()


@pytest.mark.parametrize("text", ["yesterday", "2025-13-01", "01.03.2025"])
def test_a_day_that_is_none(text):
    with pytest.raises(TokenRatioError, match=r"template_date must be a date such as 2025-03-01"):
        TemplateSettings.of(template_date=text)


# What a run and a row tell the template.


def test_a_rows_own_arguments_win_over_the_runs():
    tokenizer = family_tokenizer("qwen3")
    run = TemplateSettings({"enable_thinking": False})
    row = chat_pair("sky?", "blue", "green")
    thinking = {**row, "chat_template_kwargs": {"enable_thinking": True}}
    prepared = prepare([row, thinking], tokenizer, template=run)
    assert texts(prepared, tokenizer)["prompt"].endswith("assistant\n<think>\n\n</think>\n\n")
    assert texts(prepared, tokenizer, 1)["prompt"].endswith("assistant\n")
    assert prepared.template == {"chat_template_kwargs": {"enable_thinking": False}}


def test_tools_of_the_run_are_for_rows_without_any():
    tokenizer = family_tokenizer("hermes")
    own = {"type": "function", "function": {"name": "clock"}}
    turns = [{"role": "user", "content": "sky?"}]
    run = TemplateSettings(tools=[WEATHER])
    assert "weather" in render_prompt(Conversation(turns), tokenizer, run)
    rendered = render_prompt(Conversation(turns, [own]), tokenizer, run)
    assert "clock" in rendered
    assert "weather" not in rendered


def test_a_prompt_as_a_value_holds_all_that_it_tells_the_template():
    turns = [{"role": "user", "content": "a"}]
    values = [
        prompt_value("a"),
        prompt_value(Conversation(turns)),
        prompt_value(Conversation(turns, [WEATHER])),
        prompt_value(Conversation(turns, None, {"enable_thinking": False})),
    ]
    assert values[:2] == ["a", turns]
    assert all(first != second for first in values for second in values if first is not second)


def test_another_template(tmp_path):
    tokenizer = family_tokenizer("strips")
    path = tmp_path / "training.jinja"
    path.write_text(FAMILIES["chatml"][2])
    for given in (str(path), FAMILIES["chatml"][2]):
        other = with_chat_template(tokenizer, given)
        assert other.chat_template == FAMILIES["chatml"][2]
    assert tokenizer.chat_template == FAMILIES["strips"][2]
    assert with_chat_template(tokenizer, None) is tokenizer
    with pytest.raises(TokenRatioError, match=r"cannot read chat_template 'nowhere\.jinja'"):
        with_chat_template(tokenizer, "nowhere.jinja")


def test_a_generation_prompt_that_opens_the_reasoning_has_a_way_out():
    rows = [chat_pair("2 + 2?", "<think>\nTwo.\n</think>\n\n4", "5")]
    with pytest.raises(TokenRatioError, match=r"no boundary exists; set chat_template to one that"):
        prepare(rows, family_tokenizer("opens_think"))


# What a template leaves out.


def omitted(rows, tokenizer, **more):
    report = prepare(rows, tokenizer, **more).report
    return [w.detail for w in report.warnings if w.kind is WarningKind.TEMPLATE_OMISSION]


def test_reasoning_that_is_cut_off_is_counted_and_said():
    tokenizer = family_tokenizer("strips")
    thought = "<think>\nA short list will do.\n</think>\n\n"
    rows = [
        chat_pair("fruit?", f"{thought}A plum.", "A stone."),
        chat_pair("tree?", "An oak.", f"{thought}A lamp."),
        chat_pair("bird?", "A wren.", "A boat."),
        chat_pair(
            "2 + 2?", "<think>\nTwo and two.\n</think>\n\n4", "<think>\nA guess.\n</think>\n\n4"
        ),
    ]
    prepared = prepare(rows, tokenizer)
    details = [w.detail for w in prepared.report.warnings]
    assert details == [
        "38 characters of chosen: '<think> A short list wil'…",
        "38 characters of rejected: '<think> A short list wil'…",
    ]
    assert "text left out by the template: 2" in prepared.report.summary()
    (refused,) = prepared.report.defects
    assert refused.kind is DefectKind.IDENTICAL_TOKENS
    assert "the template leaves out what tells them apart" in refused.detail
    assert "chosen: '<think> Two and two. </t'…" in refused.detail


def test_tools_and_calls_are_left_out_by_a_template_that_knows_neither():
    call = {"function": {"name": "weather", "arguments": {"place": 'Paris, "Île"'}}}
    turns = [
        {"role": "user", "content": "sky?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain"},
    ]
    row = {**chat_pair("", "It rains.", "It shines."), "prompt": turns, "tools": [WEATHER]}
    (detail,) = omitted([row], family_tokenizer("chatml"))
    assert "22 characters of tools: 'weather Tells the sky.'" in detail
    assert "of prompt: 'weather Paris, \"Île\"'" in detail
    as_text = {"function": {"name": "weather", "arguments": '{"place": "Paris, \\"Île\\""}'}}
    for calls in ([call], [as_text]):
        turns[1]["tool_calls"] = calls
        assert omitted([row], family_tokenizer("hermes")) == []


def test_a_call_that_is_left_out_is_not_found_in_the_tools():
    row = chat_pair("weather in Paris?", "", "I do not know.", tools=[WEATHER])
    row["chosen"][0]["tool_calls"] = [
        {"function": {"name": "weather", "arguments": {"place": "Paris"}}}
    ]
    assert omitted([row], family_tokenizer("hermes")) == []
    # renders tools, but no calls
    silent = with_chat_template(
        family_tokenizer("hermes"), FAMILIES["hermes"][2].replace("m.tool_calls or []", "[]")
    )
    row["chosen"][0]["content"] = "Let me see."
    (detail,) = omitted([row], silent)
    assert detail == "13 characters of chosen: 'weather Paris'"


def test_a_turn_that_is_dropped():
    row = chat_pair("sky?", "blue", "green")
    row["prompt"].insert(0, {"role": "system", "content": "Answer in one word."})
    (detail,) = omitted([row], family_tokenizer("strips"))
    assert detail == "19 characters of prompt: 'Answer in one word.'"
    assert omitted([row], family_tokenizer("llama3")) == []


def test_reasoning_of_its_own_field():
    row = chat_pair("sky?", "blue", "green")
    row["chosen"][0]["reasoning_content"] = "Look up."
    assert omitted([row], family_tokenizer("chatml")) == ["8 characters of chosen: 'Look up.'"]
    assert omitted([row], family_tokenizer("qwen3")) == []


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"opens_think"}))
def test_no_false_alarm(family):
    contents = [
        ("  padded \n", " blue\n\n", "\tgreen "),
        ("a < b & 'c' \"d\"", 'x = {"k": [1, 2]}\n\n\n    indented', "\\n is no newline"),
        ("été – naïve 北京", "🙂 fine", "so\u00a0so"),
        ("one", "two\r\nlines", "three"),
    ]
    rows = [chat_pair(*each) for each in contents]
    assert omitted(rows, family_tokenizer(family)) == []


_HTML = "m.content | replace('&', '&amp;') | replace('<', '&lt;') | replace('\"', '&#34;')"


@pytest.mark.parametrize("escape", [_HTML, "m.content | tojson", "m.content | trim"])
def test_escaped_text_is_not_left_out(escape):
    tokenizer = family_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", f"({escape})")
    assert omitted([chat_pair('a < "b" é', 'x & "y"\nz', "'w' >")], tokenizer) == []


def test_reasoning_that_is_rendered_is_not_left_out():
    rows = [
        chat_pair("2 + 2?", "<think>\nTwo and two.\n</think>\n\n4", "<think>\n\n</think>\n\n5"),
        chat_pair("3 + 3?", "Three twice.</think>6", "7"),
    ]
    for family in ("qwen3", "chatml", "llama3", "gemma"):
        assert omitted(rows, family_tokenizer(family)) == []
