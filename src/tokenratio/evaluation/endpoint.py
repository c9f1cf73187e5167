"""An OpenAI-compatible endpoint: concurrent requests, with retries and a budget.

vLLM, TGI, llama.cpp and hosted services support this protocol. The `openai` client sends; this
module decides when to retry and when to stop, because answers cost money.
"""

import asyncio
import atexit
import concurrent.futures
import hashlib
import json
import os
import random
import re
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn
from urllib.parse import urlsplit

from tqdm import tqdm

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.budget import Budget, BudgetError, Ledger
from tokenratio.evaluation.openai_api import (
    ReplyError,
    Request,
    arguments_of,
    may_have_cost,
    read_reply,
    reason_of,
    retry_after,
)
from tokenratio.masking import mask_secrets, mask_text
from tokenratio.models.response import Response
from tokenratio.names import require_at_least, require_choice
from tokenratio.settings import option

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_LONGEST_PAUSE = 600.0  # seconds; a request fails if the server asks for a longer one
_MASKED = 4000  # characters of a server's message that are looked at
_LONGEST_REPLY = 16 << 20  # bytes, after decompression


@dataclass(frozen=True)
class EndpointSettings:
    """Which server to ask, and how."""

    base_url: str = option(
        "", "Address of the server, version included, such as http://localhost:8000/v1."
    )
    model: str = option("", "The model's name on the server.")
    api: Literal["chat", "completions"] = option(
        "chat",
        "chat sends conversations, with plain text as one user turn; completions sends plain text.",
    )
    api_key_env: str = option(
        "OPENAI_API_KEY", "Environment variable that holds the key; if it is unset, no key is sent."
    )
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = option(
        "max_tokens", "Use max_completion_tokens for models that refuse max_tokens."
    )
    extra_body: dict[str, Any] = option(
        {}, "Additional fields of every request, such as '{top_k: 20}'."
    )
    concurrency: int = option(8, "Requests in flight at once.")
    timeout: float = option(120.0, "Timeout of a request, in seconds.")
    max_retries: int = option(
        6, "Retries of each request after 408, 409, 429, 5xx, a timeout or a broken connection."
    )
    backoff: float = option(
        1.0,
        "Seconds before the first retry; the wait doubles with each retry, less a random part of "
        "up to half. A longer Retry-After is respected.",
    )
    max_backoff: float = option(60.0, "Longest wait between retries, in seconds.")
    max_failures: int = option(
        10, "Give up after this many requests in a row have failed for good."
    )

    def __post_init__(self) -> None:
        require_choice("api", self.api, ("chat", "completions"))
        names = ("max_tokens", "max_completion_tokens")
        require_choice("max_tokens_name", self.max_tokens_name, names)
        if not re.fullmatch("[A-Z_][A-Z0-9_]*", self.api_key_env):  # not shown: it may be a key
            raise TokenRatioError(
                "api_key_env must be the name of an environment variable, in capitals, not the "
                "key itself"
            )
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise TokenRatioError(
                f"base_url must be an http or https address, not {self.base_url!r}"
            )
        if parts.username or parts.password or parts.query:
            # These settings are written to files.
            raise TokenRatioError(
                "base_url must not contain a user, password or query: keys come from the "
                "environment"
            )
        require_at_least(1, concurrency=self.concurrency, max_failures=self.max_failures)
        require_at_least(0, max_retries=self.max_retries)
        if not (self.timeout > 0 and self.backoff >= 0 and self.max_backoff >= 0):
            raise TokenRatioError("timeout must be positive, backoff and max_backoff at least 0")

    def identity(self) -> dict[str, Any]:
        """The settings that the answers depend on, secrets masked; a digest tells those apart."""
        settings = {name: getattr(self, name) for name in ("base_url", "model", "api")}
        if not self.extra_body:
            return settings
        masked = mask_secrets(self.extra_body)
        if masked != self.extra_body:
            whole = json.dumps(self.extra_body, sort_keys=True, default=str)
            settings["extra_body_sha256"] = hashlib.sha256(whole.encode()).hexdigest()
        return settings | {"extra_body": masked}


@dataclass(frozen=True)
class Failure:
    """A request that was not answered.

    Attributes:
        is_final: it never will be: the server refuses it, for example because it is too long or
            filtered.
    """

    reason: str
    is_final: bool = False


Answers = Generator[tuple[Request, tuple[Response, ...] | Failure], None, None]

# Open streams are closed before the interpreter exits: later, the thread of their event loop is
# gone, and closing would wait for it forever.
_STREAMS: "weakref.WeakSet[Answers]" = weakref.WeakSet()


@atexit.register
def _close_streams() -> None:
    for stream in list(_STREAMS):
        stream.close()


class Endpoint:
    """A server, with a budget for all requests to it.

    Args:
        budget: for all calls of `ask` together.
        count_tokens: of a text, for estimates; None assumes four characters per token.
        report: receives the estimate before the first request and the totals after the last.
        progress: draw a bar, in requests, with token rates.
    Raises:
        TokenRatioError: the `openai` package is missing.
    """

    def __init__(
        self,
        settings: EndpointSettings,
        *,
        budget: Budget | None = None,
        count_tokens: Callable[[str], int] | None = None,
        report: Callable[[str], None] = print,
        progress: bool = False,
    ) -> None:
        self.settings = settings
        self.ledger = Ledger(budget or Budget(), count_tokens)
        self._report, self._progress = report, progress
        self._key = os.environ.get(settings.api_key_env) or ""
        self._random = random.Random()
        try:
            import openai  # noqa: F401
        except ImportError:
            raise TokenRatioError(
                "endpoints need the openai package: pip install 'openai>=2'"
            ) from None

    def ask(self, requests: Sequence[Request]) -> Answers:
        """Send all requests; yield each with its choices as soon as they arrive, in any order.

        The next request is sent only when the consumer asks for more, so a consumer that saves each
        answer first and is killed loses at most the requests in flight.

        Raises:
            TokenRatioError: the server refuses the key, the model or the address; the budget is
                used up; or `max_failures` requests in a row failed. Requests in flight are still
                awaited and yielded, because they may be charged.
        """
        stream = self._stream(requests)
        _STREAMS.add(stream)
        return stream

    def _stream(self, requests: Sequence[Request]) -> Answers:
        from anyio.from_thread import start_blocking_portal

        if not requests:
            return
        for request in requests:
            self._check(request)
        demands = (self.ledger.demand(r.prompt, r.max_tokens, r.num_choices) for r in requests)
        where = f"{self.settings.model} at {self.settings.base_url}"
        self._report(self.ledger.estimate(demands, where))
        waiting = deque(requests)
        stop: TokenRatioError | None = None
        failures = 0
        started = time.perf_counter()
        with (
            # An event loop in its own thread: it runs while the consumer writes, and in notebooks,
            # which have a loop of their own.
            start_blocking_portal() as portal,
            tqdm(total=len(requests), unit="request", disable=not self._progress) as bar,
        ):
            client = portal.call(self._connect)
            under_way: dict[concurrent.futures.Future[tuple[Response, ...]], Request] = {}
            try:
                while under_way or (waiting and stop is None):
                    while waiting and stop is None and len(under_way) < self.settings.concurrency:
                        request = waiting.popleft()
                        future = portal.start_task_soon(self._answer, client, request)
                        under_way[future] = request
                    done, _ = concurrent.futures.wait(
                        under_way, return_when=concurrent.futures.FIRST_COMPLETED
                    )
                    for future in done:
                        request = under_way.pop(future)
                        try:
                            answer: tuple[Response, ...] | Failure = future.result()
                        except (BudgetError, _RefusedError) as error:
                            stop = stop or TokenRatioError(str(error))
                            continue
                        except _FailedError as error:
                            answer = Failure(str(error), error.is_final)
                            failures += 1
                            if failures == self.settings.max_failures:
                                reason = f"{failures} requests failed, the last ({request.name})"
                                stop = stop or TokenRatioError(f"{reason}: {error}")
                        else:
                            failures = 0
                        bar.update()
                        bar.set_postfix(self.ledger.rates(time.perf_counter() - started))
                        yield request, answer
            finally:
                for future in under_way:
                    future.cancel()
                portal.call(client.close)
        self._report(self.ledger.totals(time.perf_counter() - started))
        if stop is not None:
            raise stop

    def _check(self, request: Request) -> None:
        if self.settings.api == "completions" and not isinstance(request.prompt, str):
            raise TokenRatioError(
                f"{request.name} is a conversation, which api=completions cannot send: use api=chat"
            )

    async def _connect(self) -> "AsyncOpenAI":
        from openai import AsyncOpenAI

        # Retries and timeouts are handled here. The client requires a key.
        return AsyncOpenAI(
            base_url=self.settings.base_url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=None,
        )

    async def _answer(self, client: "AsyncOpenAI", request: Request) -> tuple[Response, ...]:
        """All choices of a request; a server that returns fewer is asked again for the rest."""
        choices: tuple[Response, ...] = ()
        while len(choices) < request.num_choices:
            choices += await self._some_choices(client, request, len(choices))
        return choices

    async def _some_choices(
        self, client: "AsyncOpenAI", request: Request, have: int
    ) -> tuple[Response, ...]:
        wanted = request.num_choices - have
        demand = self.ledger.demand(request.prompt, request.max_tokens, wanted)
        reason, pause = "", 0.0
        for attempt in range(self.settings.max_retries + 1):
            if attempt:
                wait = min(self.settings.backoff * 2 ** (attempt - 1), self.settings.max_backoff)
                await asyncio.sleep(max(pause, wait * self._random.uniform(0.5, 1.0)))
            self.ledger.reserve(demand)
            answer, maybe_paid = None, False
            try:
                answer = read_reply(await self._send(client, request, have), wanted)
                return answer.choices
            except Exception as error:
                maybe_paid = may_have_cost(error)
                reason, pause = self._retry_reason(error)
            finally:
                self.ledger.settle(demand, answer, maybe_paid=maybe_paid)
            if pause > _LONGEST_PAUSE:
                raise _FailedError(f"{reason}; the server asks to wait for {pause:.4g} s")
        num = self.settings.max_retries + 1
        raise _FailedError(f"{reason}; tried {'once' if num == 1 else f'{num} times'}")

    async def _send(self, client: "AsyncOpenAI", request: Request, have: int) -> str:
        arguments = arguments_of(request, self.settings, have)
        resource = client.chat.completions if self.settings.api == "chat" else client.completions
        async with asyncio.timeout(self.settings.timeout):
            async with resource.with_streaming_response.create(**arguments) as reply:
                content = bytearray()
                async for part in reply.iter_bytes():
                    content += part
                    if len(content) > _LONGEST_REPLY:
                        raise ReplyError(f"the answer is longer than {_LONGEST_REPLY >> 20} MiB")
                return content.decode("utf-8", "replace")

    def _retry_reason(self, error: Exception) -> tuple[str, float]:
        """The reason to retry after an error, and the seconds that the server asks to wait.

        Raises:
            _RefusedError, _FailedError: there is no reason to retry.
        """
        import openai

        if isinstance(error, openai.APIStatusError):
            reason = self._clean(f"HTTP {error.status_code}: {reason_of(error)}")
            if error.status_code in (401, 403, 404):
                self._refuse(error.status_code, reason)
            if error.status_code in (408, 409, 429) or error.status_code >= 500:
                return reason, retry_after(error.response.headers)
            raise _FailedError(reason, is_final=True) from None
        if isinstance(error, TimeoutError | openai.APITimeoutError):
            return f"no answer within {self.settings.timeout:g} s", 0.0
        if isinstance(error, openai.APIConnectionError):
            cause = error.__cause__ or error
            return self._clean(f"the connection failed: {type(cause).__name__}: {cause}"), 0.0
        if isinstance(error, ReplyError):
            return self._clean(str(error)), 0.0
        raise error

    def _refuse(self, status: int, reason: str) -> NoReturn:
        settings = self.settings
        hint = f"check the model name {settings.model!r} and the address"
        if status != 404:
            known = "holds a key that it does not accept" if self._key else "is not set"
            hint = f"the environment variable {settings.api_key_env} {known}"
        raise _RefusedError(f"{settings.base_url} refuses to answer ({reason}): {hint}")

    def _clean(self, text: str) -> str:
        """A server's message, shortened, without the key, which some servers repeat."""
        if self._key:
            text = text.replace(self._key, "<key>")
        text = " ".join(text.split())
        # Between words, so that no half secret stays, and first: masking megabytes takes long.
        is_long = len(text) > _MASKED
        text = mask_text(text[:_MASKED].rpartition(" ")[0] if is_long else text)
        return f"{text[:300]} …" if is_long or len(text) > 300 else text


class _RefusedError(Exception):
    """No request will be answered."""


class _FailedError(Exception):
    """This request will not be answered; `is_final` if another try would not help."""

    def __init__(self, reason: str, *, is_final: bool = False) -> None:
        super().__init__(reason)
        self.is_final = is_final
