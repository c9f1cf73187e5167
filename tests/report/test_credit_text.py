"""Texts of single tokens: characters split over tokens, and the kinds of tokenizers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from report.credit_cases import byte_tokenizer
from tiny import tiny_tokenizer
from tokenratio.report.credit_text import TokenTexts, joined


@given(st.data(), st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None, derandomize=True)
def test_no_character_is_lost_however_its_bytes_are_split(data, text):
    whole = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    parts = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    shown = joined(parts)
    assert len(shown) == len(parts)
    assert "".join(own for _, own in shown) == text
    rest = [bytes.fromhex(each.strip("⟨⟩")) for each, _ in shown]
    assert all(part.startswith(front) for part, front in zip(parts, rest, strict=True))


def test_bytes_that_make_no_character_are_shown_as_bytes():
    assert joined([b"a\xff", b"\xf0\x9f\x98"]) == [("", "a⟨FF⟩"), ("", "⟨F0 9F 98⟩")]
    assert joined([b"\xf0\x9f", b"\x98", b"\x8a!"]) == [("", "😊"), ("⟨98⟩", ""), ("⟨8A⟩", "!")]


def test_a_byte_level_tokenizer_s_texts():
    tokenizer = byte_tokenizer()
    ids = tokenizer("é \n<|tag|>", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    found = TokenTexts(tokenizer, [tokenizer.eos_token_id]).of_response(ids)
    assert [(each.text, each.kind) for each in found] == [
        ("é", "text"),
        ("⟨A9⟩", "part"),
        (" ", "text"),
        ("\n", "text"),
        ("<|tag|>", "special"),
        ("<eos>", "end"),
    ]


def test_an_end_in_the_middle_is_a_special_token():
    tokenizer = tiny_tokenizer()
    found = TokenTexts(tokenizer, [2]).of_response([4, 2, 5])
    assert [(each.text, each.kind) for each in found] == [
        ("ash", "text"),
        ("<eos>", "special"),
        ("bay", "text"),
    ]


def test_sentencepiece_writes_spaces_and_bytes_of_its_own():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"▁cat": 0, "<0xE2>": 1, "<0x82>": 2, "<0xAC>": 3, "</s>": 4}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    found = TokenTexts(tokenizer, [4]).of_response([0, 1, 2, 3, 4])
    assert [each.text for each in found] == [" cat", "€", "⟨82⟩", "⟨AC⟩", "</s>"]


@pytest.mark.parametrize("id", [16, 10_000])
def test_an_embedding_without_a_token_has_its_id(id):
    assert TokenTexts(tiny_tokenizer(), [2]).of_token(id) == f"⟨id {id}⟩"
