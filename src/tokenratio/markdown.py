"""Markdown from texts that may hold markup of their own."""

import html
import re
from collections.abc import Iterable, Sequence

_MARKUP = re.compile(r"([\\`*\[\]#|~]|(?<!\w)_|_(?!\w))")


def markdown_text(value: object) -> str:
    """A value as one line of Markdown that shows it as it is.

    >>> markdown_text("a|b <i>*c*</i> win_rate")
    'a\\\\|b &lt;i&gt;\\\\*c\\\\*&lt;/i&gt; win_rate'
    """
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return html.escape(_MARKUP.sub(r"\\\1", " ".join(text.split())), quote=False)


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table; empty without rows."""
    lines = [" | ".join(map(markdown_text, row)) for row in rows]
    head = [" | ".join(map(markdown_text, header)), " | ".join(["---"] * len(header))]
    return "\n".join(f"| {line} |" for line in [*head, *lines]) if lines else ""
