"""Token ids: prefix once, EOS once, one boundary, and cuts that never part a pair."""

import hashlib
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenratio.data import DefectKind, WarningKind, prepare_completions, prepare_pairs
from tokenratio.data.encoding import EncodedExample, special_tokens
from tokenratio.data.preparation import _digest
from tokenratio.errors import TokenRatioError


def pair(prompt="the sky is", chosen=" blue", rejected=" green"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def chat(prompt="sky?", chosen="blue", rejected="green"):
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def prepare(rows, tokenizer, max_length=None, max_prompt_length=None, **more):
    return prepare_pairs(
        rows, tokenizer, max_length=max_length, max_prompt_length=max_prompt_length, **more
    )


def encode(row, tokenizer, **limits):
    return prepare([row], tokenizer, **limits).dataset[0]


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def texts(row, tokenizer):
    return {
        name: tokenizer.decode(row[name], clean_up_tokenization_spaces=False)
        for name in row
        if name.endswith("_ids")
    }


# The tokenizer's own habits.


@pytest.mark.parametrize("kind", ["bytes", "words", "sentencepiece"])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("appends_eos", [False, True])
@pytest.mark.parametrize("eos", ["</s>", "<s>"])
def test_the_prefix_is_found_by_asking(make_tokenizer, kind, bos, appends_eos, eos):
    tokenizer = make_tokenizer(kind, bos=bos, appends_eos=appends_eos, eos=eos)
    special = special_tokens(tokenizer)
    begin = tokenizer.convert_tokens_to_ids("<s>")
    assert special.prefix == ((begin,) if bos else ())
    assert special.start == (begin,)
    row = encode(pair("a", "b", "c"), tokenizer)
    assert row["prompt_ids"] == [*special.prefix, *ids(tokenizer, "a")]
    assert row["chosen_ids"][-1] == tokenizer.eos_token_id
    assert row["chosen_ids"].count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("appends_eos", [False, True])
def test_the_prefix_of_a_tokenizer_that_drops_the_probe(make_tokenizer, bos, appends_eos):
    tokenizer = make_tokenizer("letter_b", bos=bos, appends_eos=appends_eos)
    assert ids(tokenizer, "a") == []
    assert special_tokens(tokenizer).prefix == (tokenizer.bos_token_id,) * bos


def test_bos_is_not_doubled(make_tokenizer):
    tokenizer = make_tokenizer(bos=True)
    plain, own = encode(pair(), tokenizer), encode(pair(prompt="<s>the sky is"), tokenizer)
    assert plain["prompt_ids"] == own["prompt_ids"]
    text = prepare_completions(
        [{"text": "<s>the sky"}, {"text": "the sky"}], tokenizer, max_length=None
    )
    first, second = text.dataset
    assert first["prompt_ids"] == second["prompt_ids"] == [tokenizer.bos_token_id]
    assert first["completion_ids"] == second["completion_ids"]


@pytest.mark.parametrize(("bos_token", "start"), [("<s>", "<s>"), (None, "</s>")])
def test_an_empty_prompt_has_a_start(make_tokenizer, bos_token, start):
    tokenizer = make_tokenizer(bos_token=bos_token)
    row = encode(pair(prompt=""), tokenizer)
    assert tokenizer.convert_ids_to_tokens(row["prompt_ids"]) == [start]


def test_no_eos_is_an_error(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(TokenRatioError, match="no EOS token"):
        prepare([pair()], tokenizer)


# The end of a response.


@pytest.mark.parametrize(
    "chosen", ["blue", "blue</s>", "blue</s>\n", "blue</s></s>", "blue</s> \n\t"]
)
def test_eos_exactly_once(tokenizer, chosen):
    row = encode(pair(chosen=chosen), tokenizer)
    assert texts(row, tokenizer)["chosen_ids"] == "blue</s>"
    assert row["chosen_ids"] == [*ids(tokenizer, "blue"), tokenizer.eos_token_id]


def test_whitespace_without_eos_stays(tokenizer):
    assert (
        texts(encode(pair(chosen="blue \n"), tokenizer), tokenizer)["chosen_ids"] == "blue \n</s>"
    )


def test_eos_inside_is_kept_and_warned_of(tokenizer):
    prepared = prepare([pair(chosen="blue</s>no"), pair("the grass is")], tokenizer)
    assert prepared.report.warning_counts == {WarningKind.EOS_INSIDE_RESPONSE: 1}
    assert texts(prepared.dataset[0], tokenizer)["chosen_ids"] == "blue</s>no</s>"


@pytest.mark.parametrize("chosen", ["</s>", " </s>\n"])
def test_nothing_before_eos_is_blank(tokenizer, chosen):
    prepared = prepare([pair(chosen=chosen), pair()], tokenizer)
    expected = 1 if chosen == "</s>" else 0  # a space is a token
    assert prepared.report.defect_counts.get(DefectKind.BLANK_RESPONSE, 0) == expected


# The boundary.


def test_the_boundary_is_made_in_token_space(tokenizer):
    # Joined, " " and "blue" merge to one token that begins inside the prompt.
    row = encode(pair(prompt="the sky is ", chosen="blue", rejected="green"), tokenizer)
    assert row["prompt_ids"] == ids(tokenizer, "the sky is ")
    assert row["chosen_ids"][:-1] == ids(tokenizer, "blue")
    assert ids(tokenizer, "the sky is blue") != row["prompt_ids"] + row["chosen_ids"][:-1]


def test_a_tokenizers_own_space_does_not_enter_the_response(make_tokenizer):
    tokenizer = make_tokenizer("sentencepiece")
    row = encode(pair(prompt="Sky?", chosen="blue", rejected=" green"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(row["prompt_ids"]) == list("▁Sky?")
    assert tokenizer.convert_ids_to_tokens(row["chosen_ids"]) == [*"blue", "</s>"]
    assert tokenizer.convert_ids_to_tokens(row["rejected_ids"]) == [*"▁green", "</s>"]


def test_chat_template(chat_tokenizer):
    row = encode(chat(), chat_tokenizer)
    assert texts(row, chat_tokenizer) == {
        "prompt_ids": "<|im_start|>user\nsky?<|im_end|>\n<|im_start|>assistant\n",
        "chosen_ids": "blue<|im_end|>",
        "rejected_ids": "green<|im_end|>",
    }


def test_a_template_whose_turn_end_is_not_eos(make_tokenizer, chat_tokenizer):
    tokenizer = make_tokenizer(eos="</s>", template=chat_tokenizer.chat_template)
    assert texts(encode(chat(), tokenizer), tokenizer)["chosen_ids"] == "blue<|im_end|>"


def test_a_template_that_writes_bos(make_tokenizer, chat_tokenizer):
    template = "<s>" + chat_tokenizer.chat_template
    tokenizer = make_tokenizer(bos=True, template=template)
    assert encode(chat(), tokenizer)["prompt_ids"].count(tokenizer.bos_token_id) == 1


def test_tools_reach_the_template(make_tokenizer, chat_tokenizer):
    template = "{% if tools %}[{{ tools[0]['name'] }}]{% endif %}" + chat_tokenizer.chat_template
    tokenizer = make_tokenizer(template=template)
    row = encode({**chat(), "tools": [{"name": "find"}]}, tokenizer)
    assert texts(row, tokenizer)["prompt_ids"].startswith("[find]")


def test_a_rows_own_template_arguments_reach_the_template(make_tokenizer, chat_tokenizer):
    template = "{% if terse %}[find]{% endif %}" + chat_tokenizer.chat_template
    tokenizer = make_tokenizer(template=template)
    row = encode({**chat(), "chat_template_kwargs": {"terse": True, "other": None}}, tokenizer)
    assert texts(row, tokenizer)["prompt_ids"].startswith("[find]")


def test_template_failures_are_refused_with_their_reason(make_tokenizer, chat_tokenizer):
    moody = "{% if messages|length > 1 and 'x' in messages[0]['content'] %}!{% endif %}"
    refusing = "{% if 'Y' in messages[0]['content'] %}{{ raise_exception('no Y') }}{% endif %}"
    tokenizer = make_tokenizer(template=moody + refusing + chat_tokenizer.chat_template)
    prepared = prepare([chat(), chat("x"), chat("Y")], tokenizer)
    assert prepared.report.defect_counts == {DefectKind.TEMPLATE_FAILURE: 2}
    differs, refused = prepared.report.defects
    assert "differently when chosen follows, first at character 0" in differs.detail
    assert "no Y" in refused.detail


def test_no_chat_template(tokenizer):
    with pytest.raises(
        TokenRatioError, match=r"train_dataset:0 is a conversation, .* no chat templ"
    ):
        prepare([chat()], tokenizer)


# Truncation.


def test_prompts_are_cut_on_the_left_and_keep_their_prefix(make_tokenizer):
    tokenizer = make_tokenizer("words", bos=True)
    prepared = prepare([pair("a b c d e", "a", "b")], tokenizer, max_prompt_length=3)
    assert tokenizer.convert_ids_to_tokens(prepared.dataset[0]["prompt_ids"]) == ["<s>", "d", "e"]
    assert prepared.cuts == {0: (3, 0, 0)}
    assert prepared.report.to_dict()["truncated"]["prompt"] == {"rows": 1, "tokens": 3}


def test_responses_are_cut_on_the_right_and_lose_their_end(make_tokenizer):
    tokenizer = make_tokenizer("words")
    prepared = prepare([pair("a b", "a b c d", "b c")], tokenizer, max_length=5)
    row = prepared.dataset[0]
    assert tokenizer.convert_ids_to_tokens(row["chosen_ids"]) == ["a", "b", "c"]
    assert tokenizer.convert_ids_to_tokens(row["rejected_ids"]) == ["b", "c", "</s>"]
    assert prepared.cuts == {0: (0, 2, 0)}
    # The end alone is cut: the response did not end within the limit.
    exact = prepare([pair("a b", "a b c", "b c")], tokenizer, max_length=5)
    assert tokenizer.convert_ids_to_tokens(exact.dataset[0]["chosen_ids"]) == ["a", "b", "c"]
    assert exact.cuts == {0: (0, 1, 0)}


def test_prompts_without_room_are_refused(make_tokenizer):
    tokenizer = make_tokenizer("words")
    rows = [pair("a b c d", "a", "b"), pair("a b c", "a", "b")]
    prepared = prepare(rows, tokenizer, max_length=4)
    assert prepared.report.defect_counts == {DefectKind.PROMPT_FILLS_MAX_LENGTH: 1}
    assert prepared.dataset[0]["origin"] == "train_dataset:1"
    assert prepare(rows, tokenizer, max_length=4, max_prompt_length=3).report.rows_kept == 2
    with pytest.raises(
        TokenRatioError, match=r"train_dataset:0: prompt fills max_length: .* 4 tokens"
    ):
        prepare(rows, tokenizer, max_length=4, on_bad_row="error")
    with pytest.raises(TokenRatioError, match="None of the 2 rows can be used"):
        prepare(rows, tokenizer, max_length=3)


def test_pairs_made_identical_are_refused(make_tokenizer):
    tokenizer = make_tokenizer("words")
    rows = [pair("a", "b c d", "b c e"), pair("a", "b  c", "b c"), pair("a", "b", "c")]
    prepared = prepare(rows, tokenizer, max_length=3)
    assert prepared.report.defect_counts == {
        DefectKind.IDENTICAL_AFTER_TRUNCATION: 1,
        DefectKind.IDENTICAL_TOKENS: 1,
    }


@pytest.mark.parametrize(
    "limits", [{"max_length": 1}, {"max_prompt_length": 1}, {"max_length": -3}]
)
def test_limits_no_row_can_meet(make_tokenizer, limits):
    with pytest.raises(TokenRatioError, match="must be at least 2"):
        prepare([pair()], make_tokenizer(bos=True), **limits)


@pytest.fixture(scope="module")
def built(make_tokenizer):
    return {bos: make_tokenizer(bos=bos) for bos in (False, True)}


@given(
    texts=st.tuples(*[st.text("ab \n</s>é", min_size=size, max_size=12) for size in (0, 1, 1)]),
    max_length=st.none() | st.integers(2, 16),
    max_prompt_length=st.none() | st.integers(2, 8),
    bos=st.booleans(),
)
@settings(deadline=None, derandomize=True, max_examples=150)
def test_invariants(built, texts, max_length, max_prompt_length, bos):
    tokenizer = built[bos]
    eos = tokenizer.eos_token_id
    try:
        prepared = prepare([pair(*texts)], tokenizer, max_length, max_prompt_length)
    except TokenRatioError:
        return
    row = prepared.dataset[0]
    cuts = prepared.cuts.get(0, (0, 0, 0))
    prompt = row["prompt_ids"]
    assert 0 < len(prompt) <= (max_prompt_length or len(prompt))
    if bos:
        assert prompt[0] == tokenizer.bos_token_id
    whole = ids(tokenizer, texts[0])
    if cuts[0]:
        kept = prompt[bos:]
        assert whole[len(whole) - len(kept) :] == kept
    for side, cut in zip(("chosen", "rejected"), cuts[1:], strict=True):
        response = row[f"{side}_ids"]
        assert 0 < len(response) <= (max_length or 10**9) - len(prompt)
        ends = list(takewhile(eos.__eq__, reversed(response)))
        assert len(ends) == 1 or cut
    assert row["chosen_ids"] != row["rejected_ids"]


# The dataset and its digest.


def test_columns(make_tokenizer):
    tokenizer = make_tokenizer("words")
    prepared = prepare([pair("a", "", "b"), pair("a", "b", "c"), pair("b", "b", "c")], tokenizer)
    assert prepared.dataset.column_names == [
        "prompt_ids",
        "chosen_ids",
        "rejected_ids",
        "row",
        "origin",
    ]
    assert prepared.dataset["row"][:] == [0, 1]
    assert prepared.dataset["origin"][:] == ["train_dataset:1", "train_dataset:2"]
    assert prepared.dataset.features["prompt_ids"].feature.dtype == "int32"
    assert prepared.dataset.cache_files == []
    assert prepared.report.lengths == {"prompt": 2, "chosen": 4, "rejected": 4}
    completions = prepare_completions([{"text": "a"}], tokenizer, max_length=None)
    assert completions.dataset.column_names == ["prompt_ids", "completion_ids", "row", "origin"]
    assert completions.report.past_shorter is None


def test_digest(make_tokenizer, chat_tokenizer):
    base = prepare([chat()], chat_tokenizer).digest
    assert prepare([chat()], chat_tokenizer).digest == base
    assert len(base) == len(hashlib.sha256().hexdigest())
    template = chat_tokenizer.chat_template
    others = [
        prepare([{**chat(), "id": 3}], chat_tokenizer),
        prepare([chat(chosen="red")], chat_tokenizer),
        prepare([chat()], chat_tokenizer, max_length=40),
        prepare([chat()], chat_tokenizer, max_prompt_length=5),
        prepare([chat()], make_tokenizer(eos="<|im_end|>", template="Now:" + template)),
        prepare([chat()], make_tokenizer("sentencepiece", eos="<|im_end|>", template=template)),
    ]
    digests = {other.digest for other in others} - {base}
    # A limit that cuts nothing changes nothing.
    assert len(digests) == len(others) - (others[2].cuts == {})


def test_boundary_is_part_of_the_digest():
    one = EncodedExample([1, 2], ([3], [4]), 0, (0, 0))
    two = EncodedExample([1], ([2, 3], [4]), 0, (0, 0))
    assert _digest([], [one]) != _digest([], [two])


def test_the_tokenizer_is_not_changed(make_tokenizer):
    tokenizer = make_tokenizer()
    before = tokenizer.backend_tokenizer.to_str(), dict(tokenizer.special_tokens_map)
    prepare([pair()], tokenizer, max_length=8)
    assert (tokenizer.backend_tokenizer.to_str(), dict(tokenizer.special_tokens_map)) == before
