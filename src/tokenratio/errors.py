"""The one exception for what a user can put right; the command line prints it as one line."""


class TokenRatioError(ValueError):
    """Data, settings or a model that cannot be used: says what is wrong, where, and what to do."""
