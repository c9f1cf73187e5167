"""The exception for mistakes that a user can fix; the command line prints it as one line."""


class TokenRatioError(ValueError):
    """Data, settings or a model that cannot be used: says what is wrong, where, and what to do."""


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its type if it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
