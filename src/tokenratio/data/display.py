"""Text from data made safe for a terminal: control characters are escaped."""

from unicodedata import category


def printable(text: str) -> str:
    r"""Escape every character that could move the cursor, recolour or reorder the line.

    >>> print(printable("a\x1b[2Jb\nc\u202e"))
    a\x1b[2Jb\nc\u202e
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def visible(text: str) -> str:
    r"""Write out what is invisible or would reorder the line; spaces and line ends stay.

    >>> print(visible("good\u202eevil\u200b!"))
    goodU+202EevilU+200B!
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t" or category(c) == "Zs" else f"U+{ord(c):04X}"
        for c in text.replace("\r\n", "\n")
    )


def quoted(text: str, limit: int) -> str:
    """`repr` of a text, its middle left out when it has more than `limit` characters.

    >>> quoted("abcdefghij", 6)
    "'abcd' …4 characters… 'ij'"
    """
    if len(text) <= limit:
        return repr(text)
    # Both ends matter: where the prompt ends, and whether the response does.
    head, tail = limit - limit // 3, limit // 3
    return f"{text[:head]!r} …{len(text) - limit:,} characters… {text[len(text) - tail :]!r}"
