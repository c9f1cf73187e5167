"""The exception for mistakes that a user can fix; the command line prints it as one line."""

from collections.abc import Iterator
from contextlib import contextmanager


class TokenRatioError(ValueError):
    """Data, settings or a model that cannot be used: says what is wrong, where, and what to do."""


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its type if it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


@contextmanager
def reported_as(message: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn a library's error of these kinds, or of any, into a `TokenRatioError` of one line.

    Raises:
        TokenRatioError: the message and the first line of the error's.
    """
    caught = kinds or (Exception,)
    try:
        yield
    except TokenRatioError:
        raise
    except caught as error:
        raise TokenRatioError(f"{message}: {first_line(error)}") from None
