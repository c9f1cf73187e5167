"""The one exception for what a user can put right: the command line prints it as one line, exit code 2."""


class TokenRatioError(Exception):
    """Something in the data, the settings or the model cannot be used; says what, where and what to do."""
