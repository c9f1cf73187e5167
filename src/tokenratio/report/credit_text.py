"""The text of single tokens: whole characters as they are, parts of characters as bytes."""

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

Kind = Literal["text", "part", "special", "end"]
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class TokenText:
    """A token as it is shown.

    Attributes:
        text: its characters; one that continues in the next tokens stands with its first token,
            and what the others hold of it is written as bytes, as in "⟨82 AC⟩".
        kind: `end`, the token that ends the response; `special`, any other special token; `part`,
            one that holds nothing but the rest of a character.
    """

    text: str
    kind: Kind = "text"


class TokenTexts:
    """The texts of a tokenizer's tokens.

    Args:
        ends: ids that end a response where they are its last token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> None:
        self._ends = frozenset(ends)
        self._special = {
            id for id, token in tokenizer.added_tokens_decoder.items() if token.special
        } | set(tokenizer.all_special_ids)
        self._bytes = cache(token_bytes(tokenizer))

    def of_response(self, ids: Sequence[int]) -> list[TokenText]:
        """The tokens of a response, or of the front of one."""
        texts = joined([self._bytes(id) for id in ids])
        last = len(ids) - 1
        return [
            TokenText(
                rest + own or f"⟨id {id}⟩",
                self._kind(id, is_last=index == last, is_part=bool(rest) and not own),
            )
            for index, (id, (rest, own)) in enumerate(zip(ids, texts, strict=True))
        ]

    def of_token(self, id: int) -> str:
        """One token alone."""
        return joined([self._bytes(id)])[0][1] or f"⟨id {id}⟩"

    def _kind(self, id: int, *, is_last: bool, is_part: bool) -> Kind:
        if is_last and id in self._ends:
            return "end"
        if id in self._special:
            return "special"
        return "part" if is_part else "text"


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], bytes]:
    """From the id of a token to the UTF-8 bytes that it stands for; b"" for an unknown id."""
    added = {id: str(token) for id, token in tokenizer.added_tokens_decoder.items()}
    decoders = _decoders(tokenizer)
    own: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
    table = {character: byte for byte, character in own.items()}

    def of_id(id: int) -> bytes:
        if id in added:
            return _encoded(added[id])
        token = tokenizer.convert_ids_to_tokens(int(id))
        if not isinstance(token, str):  # an embedding without a token
            return b""
        if "ByteLevel" in decoders:
            if all(character in table for character in token):
                return bytes(table[character] for character in token)
            return _encoded(token)
        if (single := _BYTE_TOKEN.fullmatch(token)) is not None:
            return bytes.fromhex(single[1])
        return _encoded(token.replace("▁", " "))  # of sentencepiece

    return of_id


def joined(parts: Sequence[bytes]) -> list[tuple[str, str]]:
    """The texts of consecutive tokens, each character with the token of its first byte.

    Returns:
        For each token its bytes of a character that stands with an earlier token, written out, and
        the text that is its own.

    >>> joined([b"caf", b"\\xc3", b"\\xa9!"])
    [('', 'caf'), ('', 'é'), ('⟨A9⟩', '!')]
    >>> joined([b"\\xe2\\x82", b"x"])
    [('', '⟨E2 82⟩'), ('', 'x')]
    """
    whole, texts = b"".join(parts), []
    start = shown = 0  # of the token; bytes before `shown` belong to characters of earlier tokens
    for part in parts:
        end = start + len(part)
        position = max(start, min(shown, end))
        text, stray = "", b""
        while position < end:
            character = _character_at(whole, position)
            if character is None:
                stray += whole[position : position + 1]
                position += 1
                continue
            text, stray = text + _as_bytes(stray) + character, b""
            position += len(character.encode())
        texts.append((_as_bytes(whole[start : min(shown, end)]), text + _as_bytes(stray)))
        start, shown = end, max(shown, position)
    return texts


def _character_at(whole: bytes, position: int) -> str | None:
    """The character that begins there; None if none does."""
    first = whole[position]
    length = 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
    try:
        return whole[position : position + length].decode()
    except UnicodeDecodeError:
        return None


def _as_bytes(raw: bytes) -> str:
    return f"⟨{raw.hex(' ').upper()}⟩" if raw else ""


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _decoders(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The types of a fast tokenizer's decoders; empty for any other tokenizer."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return set()

    def types(value: Any) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(types, value))
        if not isinstance(value, dict):
            return set()
        found = {str(value["type"])} if "type" in value else set()
        return found.union(*map(types, value.values()))

    return types(json.loads(backend.decoder.__getstate__()))
