"""The flags of commands that ask an OpenAI-compatible endpoint: where, how, and for how much."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.budget import Budget
from tokenratio.evaluation.endpoint import Endpoint, EndpointSettings
from tokenratio.settings import option

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TOKENS_NAMES = ("max_tokens", "max_completion_tokens")


def _setting(name: str, text: str) -> Any:
    return option(getattr(EndpointSettings, name), text)


@dataclass(frozen=True)
class EndpointOptions:
    """The fields of `EndpointSettings`, the model apart, and of `Budget`, as flags."""

    endpoint: str | None = option(
        None, "Address of the server to ask, such as http://localhost:8000/v1."
    )
    api: Literal["chat", "completions"] = _setting(
        "api",
        "chat sends conversations, and a text as one user turn; completions sends text as it is.",
    )
    api_key_env: str = _setting(
        "api_key_env", "Environment variable that holds the key; if it is unset, no key is sent."
    )
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = _setting(
        "max_tokens_name", "Use max_completion_tokens for models that refuse max_tokens."
    )
    extra_body: dict[str, Any] = option(
        {}, "Additional fields of every request, such as '{top_k: 20}'."
    )
    concurrency: int = _setting("concurrency", "Requests in flight at once.")
    timeout: float = _setting("timeout", "Timeout of a request, in seconds.")
    max_retries: int = _setting("max_retries", "Retries of each request.")
    backoff: float = _setting("backoff", "Seconds before the first retry; doubles with each.")
    max_backoff: float = _setting("max_backoff", "Longest wait between retries, in seconds.")
    max_failures: int = _setting(
        "max_failures", "Give up after this many requests have failed for good."
    )
    max_requests: int | None = option(None, "Stop after this many requests, retries included.")
    max_cost: float | None = option(
        None, "Stop before the cost exceeds this, in the currency of the prices."
    )
    price_in: float | None = option(
        None, "Price of a million input tokens; also used for the estimate."
    )
    price_out: float | None = option(None, "Price of a million output tokens.")

    def __post_init__(self) -> None:
        if not _VARIABLE.fullmatch(self.api_key_env):
            # Most keys have a dash. Whoever gives one here must not read it again in a log.
            raise TokenRatioError(
                "api_key_env must be the name of an environment variable, not the key itself"
            )
        if self.max_tokens_name not in _TOKENS_NAMES:
            raise TokenRatioError(
                f"max_tokens_name must be {' or '.join(_TOKENS_NAMES)}, not "
                f"{self.max_tokens_name!r}"
            )

    def connect(self, model: str) -> Endpoint:
        """The server, to be asked for this model within the budget.

        Raises:
            TokenRatioError: a setting is out of range.
        """
        from tokenratio.cli.terminal import is_terminal

        limits = {limit.name: getattr(self, limit.name) for limit in fields(Budget)}
        how = {
            setting.name: getattr(self, setting.name)
            for setting in fields(EndpointSettings)
            if setting.name not in ("base_url", "model")
        }
        settings = EndpointSettings(base_url=self.endpoint or "", model=model, **how)
        return Endpoint(settings, budget=Budget(**limits), progress=is_terminal())


ENDPOINT_FLAGS = tuple(option.name for option in fields(EndpointOptions))


def refuse_idle(flags: Iterable[str], idle: Iterable[str], why: str) -> None:
    """Refuse flags that would do nothing.

    Raises:
        TokenRatioError: the first of them.
    """
    found = [flag for flag in flags if flag in tuple(idle)]
    if found:
        raise TokenRatioError(f"--{found[0]} {why}")


def split_flags(
    flags: Mapping[str, str | bool],
) -> tuple[dict[str, str | bool], dict[str, str | bool]]:
    """A command's own flags, and the endpoint's."""
    own = {name: value for name, value in flags.items() if name not in ENDPOINT_FLAGS}
    return own, {name: value for name, value in flags.items() if name in ENDPOINT_FLAGS}
