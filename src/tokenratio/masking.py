"""Keeps secrets out of what is written and shown: tokens, keys, URLs with credentials."""

import re
from collections.abc import Mapping
from typing import Any

MASK = "<masked>"
_SECRET_NAME = re.compile(r"(^|_)(token|secret|password|key|api_key)$", re.IGNORECASE)
_NAMES_SECRET = re.compile(r"(token|secret|password|key)\b['\"]?\s*[:=]", re.IGNORECASE)
# What a chat template renders is data: evaluation reads it from `run.json` and renders it again.
_RENDERED = ("chat_template", "chat_template_kwargs", "tools")
_IN_TEXT = (
    # The user of a URL may be a token, as in https://hf_...@host. People type slashes in passwords.
    re.compile(
        r"(?P<before>\b[a-z][a-z0-9+.-]{0,20}://)"
        r"([^\s/?#]+|[^\s/?#:@]*:(?!\d+/)[^\s@]*)(?P<after>@)",
        re.IGNORECASE,
    ),
    re.compile(
        r"(?P<before>[?&][\w.-]{0,40}(token|secret|password|key|signature|sig|credential)=)[^&\s#'\"]+"
        r"(?P<after>)",
        re.IGNORECASE,
    ),
    # Tokens of Hugging Face and keys of OpenAI's kind, wherever they stand.
    re.compile(r"(?P<before>\b)(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,})(?P<after>)"),
)


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret.

    >>> is_secret("hub_token"), is_secret("max_new_tokens")
    (True, False)
    """
    return _SECRET_NAME.search(name) is not None


def mask_text(text: str) -> str:
    """A text with the credentials of URLs and with tokens replaced.

    >>> mask_text("cannot load https://me:secret@host/model?token=abc")
    'cannot load https://<masked>@host/model?token=<masked>'
    """
    for pattern in _IN_TEXT:
        text = pattern.sub(rf"\g<before>{MASK}\g<after>", text)
    return text


def mask_secrets(value: Any) -> Any:
    """A document with every text replaced whose key names a secret, and `mask_text` of the others.

    >>> mask_secrets({"hub_token": "abc", "kwargs": [{"token": "abc"}, "http://a:b@host"]})
    {'hub_token': '<masked>', 'kwargs': [{'token': '<masked>'}, 'http://<masked>@host']}
    """
    if isinstance(value, Mapping):
        return {key: _masked(str(key), each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [mask_secrets(each) for each in value]
    if not isinstance(value, str) or (masked := mask_text(value)) == value:
        return value  # the same object: members of enumerations are texts too
    return masked


def shown_value(name: str, value: Any) -> str:
    """The value of a setting as messages show it.

    >>> shown_value("hub_token", "abc"), shown_value("extra_body", "{api_key: abc")
    ('<masked>', '<masked>')
    """
    text = repr(value)
    return MASK if is_secret(name) or _NAMES_SECRET.search(text) else mask_text(text)


def _masked(name: str, value: Any) -> Any:
    if name in _RENDERED:
        return value
    if is_secret(name) and isinstance(value, str):
        return MASK
    return mask_secrets(value)
