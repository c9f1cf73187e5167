"""One response to a prompt, wherever it comes from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Response:
    """What a model, an endpoint or a data set answers to a prompt.

    Attributes:
        text: without special tokens.
        finish_reason: "eos" if the model ended it, "length" if it was cut, "unknown" where the
            source does not say, or the endpoint's own word ("content_filter").
        token_ids: EOS included; None where the source does not give them.
    """

    text: str
    finish_reason: str = "unknown"
    token_ids: tuple[int, ...] | None = None
