"""A language model behind an endpoint as the judge."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

from tokenratio.data.chat import Conversation
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.asking import Request
from tokenratio.evaluation.endpoint import Endpoint, Failure
from tokenratio.evaluation.judges.answer_parsing import parse_verdict
from tokenratio.evaluation.judges.cache import VerdictCache
from tokenratio.evaluation.judges.protocol import ResponsePair, Verdict, digest_of
from tokenratio.evaluation.judges.templates import TEMPLATES, JudgeTemplate


class LLMJudge:
    """Asks which of two responses is better and reads the verdict off the answer.

    Every answer is in the cache before the next request is sent, the unparsable ones too: they were
    paid for, and at temperature 0 would come again.

    Args:
        endpoint: its `settings.api` must be "chat".
        template: one of `TEMPLATES` by name, or another.
        cache: what was answered before, by this run or any other.
        temperature: None leaves it to the server, for models that take none.
        max_tokens: longest answer; None for the template's.

    Raises:
        TokenRatioError: no such template, or an endpoint that goes on with texts.
    """

    order_matters = True

    def __init__(
        self,
        endpoint: Endpoint,
        template: str | JudgeTemplate,
        cache: VerdictCache,
        *,
        temperature: float | None = 0.0,
        max_tokens: int | None = None,
    ) -> None:
        if isinstance(template, str):
            if template not in TEMPLATES:
                raise TokenRatioError(
                    f"no judge template {template!r}; there are: {', '.join(TEMPLATES)}"
                )
            template = TEMPLATES[template]
        if endpoint.settings.api != "chat":
            raise TokenRatioError("a judge is asked in a conversation: use api=chat")
        self._endpoint, self._template, self._cache = endpoint, template, cache
        self._temperature = temperature
        self._max_tokens = max_tokens or template.max_tokens

    def identity(self) -> dict[str, Any]:
        return {
            "judge": "llm",
            **self._endpoint.settings.identity(),
            **self._template.identity(),
            "temperature": self._temperature,
            "max_tokens": self._max_tokens,
        }

    def recall(self, comparison: ResponsePair) -> Verdict | None:
        answer = self._cache.get(self._key(comparison))
        return None if answer is None else parse_verdict(*answer, self._template.verdicts)

    def __call__(self, comparisons: Sequence[ResponsePair]) -> Iterator[Verdict]:
        keys = [self._key(comparison) for comparison in comparisons]
        answers = {key: self._cache.get(key) for key in keys}
        # by key: the same question asked twice is paid once
        missing = {
            key: comparison
            for key, comparison in zip(keys, comparisons, strict=True)
            if answers[key] is None
        }
        failures: dict[str, Failure] = {}
        stream = self._endpoint.ask([self._request(*item) for item in missing.items()])
        with closing(stream):
            for key in keys:
                while answers[key] is None and key not in failures:
                    request, answer = next(stream)
                    if isinstance(answer, Failure):
                        failures[request.id] = answer
                    else:
                        (choice,) = answer
                        self._cache.put(request.id, choice.text, choice.finish_reason)
                        answers[request.id] = (choice.text, choice.finish_reason)
                found = answers[key]
                if found is None:
                    failure = failures[key]
                    yield Verdict(None, failure.reason, is_final=failure.is_final)
                else:
                    yield parse_verdict(*found, self._template.verdicts)
            for _ in stream:  # nothing is left; it says what was spent, or why it stopped
                pass

    def _key(self, comparison: ResponsePair) -> str:
        return digest_of([self.identity(), comparison.content()])

    def _request(self, key: str, comparison: ResponsePair) -> Request:
        messages = self._template.messages(
            comparison.prompt, comparison.response_a.text, comparison.response_b.text
        )
        return Request(
            key,
            Conversation(messages),
            max_tokens=self._max_tokens,
            temperature=self._temperature,
            label=f"{comparison.id}, sample {comparison.sample}",
        )
