"""The one exception for what a user can put right; the command line prints it as one line."""


class TokenRatioError(ValueError):
    """Data, settings or a model that cannot be used: says what is wrong, where, and what to do."""


def first_line(error: Exception) -> str:
    """The first line of what an exception says, or its type."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
