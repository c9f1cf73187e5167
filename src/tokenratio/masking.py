"""Keeps secrets out of what is written and shown: tokens, keys, URLs with credentials."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

MASK = "<masked>"
_SECRET_NAME = re.compile(r"(^|_)(token|secret|password|key|api_key)$", re.IGNORECASE)
_NO_SECRET_NAME = re.compile(
    r"((eos|bos|pad|unk|sep|cls|mask|stop|image|audio|video)_token|(sort|cache)_key)", re.IGNORECASE
)
_NAMES_SECRET = re.compile(r"(token|secret|password|key)\b['\"]?\s*[:=]", re.IGNORECASE)
# Names of columns, and what a chat template renders, are data: evaluation reads them from
# `run.json` and renders them again.
_DATA = ("chat_template", "chat_template_kwargs", "tools", "columns")
# What these hold, at any depth, is opened again: only credentials of URLs are masked in it.
_PATHS = re.compile(
    r"model|base|tokenizer|adapters?|starts_from|references?|peft|path|paths|files?|prompts|pairs"
    r"|token_scores|resume_from_checkpoint|\w+_(dir|folder|file|path|model|dataset)"
)
_IN_URLS = (
    # A user alone is masked where it may be a token, as in https://ghp_...@host; elsewhere, as in
    # s3://bucket@x, only if it looks like one. People type slashes in passwords. Lengths are
    # bounded, or a text of many addresses would take time with the square of its length.
    re.compile(
        r"(?P<before>\b[a-z][a-z0-9+.-]{0,20}://)"
        r"((?=[^\s/?#:@]{0,1024}\d)[^\s/?#:@]{20,1024}"
        r"|[^\s/?#:]{0,1024}:[^\s/?#]{0,1024}|[^\s/?#:@]{0,1024}:(?!\d+/)[^\s@]{0,1024}"
        r"|((?<=http://)|(?<=https://)|(?<=git://))[^\s/?#:@]{1,1024})"
        r"(?P<after>@)",
        re.IGNORECASE,
    ),
    re.compile(
        r"(?P<before>[?&][\w.-]{0,40}(token|secret|password|key|signature|sig|credential)=)[^&\s#'\"]+"
        r"(?P<after>)",
        re.IGNORECASE,
    ),
)
# Tokens of Hugging Face, which have 34 letters and digits, and keys of OpenAI's kind, unless they
# are part of a path or the name of a file.
_TOKENS = (
    re.compile(r"(?P<before>\b)hf_[A-Za-z0-9]{30,}(?P<after>\b)"),
    re.compile(
        r"(?P<before>(?<![\w./\\-]))sk-"
        r"((?=[\w-]*[A-Z])(?=[\w-]*[0-9])[A-Za-z0-9_-]{20,}|([a-z0-9]{1,10}-){0,3}[0-9a-f]{32,})"
        r"(?P<after>(?![\w/\\-]|\.\w))"
    ),
)


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret.

    >>> is_secret("hub_token"), is_secret("max_new_tokens"), is_secret("eos_token")
    (True, False, False)
    """
    return bool(_SECRET_NAME.search(name)) and not _NO_SECRET_NAME.fullmatch(name)


def mask_text(text: str) -> str:
    """A text with the credentials of URLs and with tokens replaced.

    >>> mask_text("cannot load https://me:secret@host/model?token=abc")
    'cannot load https://<masked>@host/model?token=<masked>'
    """
    return _replaced(text, _IN_URLS + _TOKENS)


def mask_secrets(value: Any) -> Any:
    """A document with every text replaced whose key names a secret, and `mask_text` of the others.

    In what names a file, a folder or a model, only the credentials of URLs are replaced.

    >>> mask_secrets({"hub_token": "abc", "kwargs": [{"token": "abc"}, "http://a:b@host"]})
    {'hub_token': '<masked>', 'kwargs': [{'token': '<masked>'}, 'http://<masked>@host']}
    """
    return _masked(value, _IN_URLS + _TOKENS)


def shown_value(name: str, value: Any) -> str:
    """The value of a setting as messages show it.

    >>> shown_value("hub_token", "abc"), shown_value("extra_body", "{api_key: abc")
    ('<masked>', '<masked>')
    """
    text = repr(value)
    return MASK if is_secret(name) or _NAMES_SECRET.search(text) else mask_text(text)


def _masked(value: Any, patterns: Sequence[re.Pattern[str]]) -> Any:
    if isinstance(value, Mapping):
        return {key: _of_key(str(key), each, patterns) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(each, patterns) for each in value]
    if not isinstance(value, str) or (masked := _replaced(value, patterns)) == value:
        return value  # the same object: members of enumerations are texts too
    return masked


def _of_key(name: str, value: Any, patterns: Sequence[re.Pattern[str]]) -> Any:
    if name in _DATA:
        return value
    if is_secret(name) and isinstance(value, str):
        return MASK
    return _masked(value, _IN_URLS if _PATHS.fullmatch(name) else patterns)


def _replaced(text: str, patterns: Sequence[re.Pattern[str]]) -> str:
    for pattern in patterns:
        text = pattern.sub(rf"\g<before>{MASK}\g<after>", text)
    return text
