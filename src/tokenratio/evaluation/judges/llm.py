"""A language model behind an endpoint as the judge."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.budget import Budget
from tokenratio.evaluation.endpoint import Endpoint, EndpointSettings, Failure
from tokenratio.evaluation.judges.answer_parsing import parse_verdict
from tokenratio.evaluation.judges.cache import VerdictCache
from tokenratio.evaluation.judges.prompt_templates import TEMPLATES, JudgeTemplate
from tokenratio.evaluation.judges.protocol import JudgeContext, ResponsePair, Verdict, digest_of
from tokenratio.evaluation.openai_api import Request
from tokenratio.names import require_at_least, require_choice
from tokenratio.settings import option


@dataclass(frozen=True)
class LLMSettings(EndpointSettings, Budget):
    """A language model behind an OpenAI-compatible endpoint, asked in both orders."""

    required: ClassVar[tuple[str, ...]] = ("base_url", "model")

    template: str = option("mt-bench", f"The question asked: {', '.join(TEMPLATES)}.")
    temperature: float | None = option(0.0, "Sampling temperature; null leaves it to the server.")
    max_tokens: int | None = option(
        None,
        "Maximum number of tokens in an answer, including reasoning. Default: the template's; "
        "judges that reason need more.",
    )
    cache: str | None = option(
        None,
        "Database of answers, which several runs can share. Default: verdicts.sqlite in the "
        "output folder of evaluate, ~/.cache/tokenratio/verdicts.sqlite for judge.",
    )

    def __post_init__(self) -> None:
        EndpointSettings.__post_init__(self)
        Budget.__post_init__(self)
        require_choice("template", self.template, TEMPLATES)
        require_at_least(1, max_tokens=self.max_tokens)

    def make(self, context: JudgeContext) -> "LLMJudge":
        endpoint = Endpoint(self, budget=self, report=context.report, progress=context.progress)
        cache = context.cache if self.cache is None else Path(self.cache).expanduser()
        return LLMJudge(
            endpoint,
            self.template,
            VerdictCache(cache),
            temperature=self.temperature,
            max_tokens=self.max_tokens,
        )


class LLMJudge:
    """Asks which of two responses is better and reads the verdict from the answer.

    Each answer is cached before the next request is sent, even if it cannot be parsed: it was paid
    for, and at temperature 0 another request would return the same.

    Args:
        endpoint: its `settings.api` must be "chat".
        template: a name in `TEMPLATES`, or a template of your own.
        cache: answers of this and other runs.
        temperature: None leaves it to the server, for models that do not support it.
        max_tokens: maximum number of tokens in an answer; None for the template's.
    Raises:
        TokenRatioError: an unknown template, or the endpoint's api is not "chat".
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
            require_choice("template", template, TEMPLATES)
            template = TEMPLATES[template]
        if endpoint.settings.api != "chat":
            raise TokenRatioError("an LLM judge needs api: chat")
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
        # By key, so that a question that occurs twice is paid for once.
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
            for _ in stream:  # the end reports what was spent, or why it stopped
                pass

    def _key(self, comparison: ResponsePair) -> str:
        return digest_of([self.identity(), comparison.content()])

    def _request(self, key: str, comparison: ResponsePair) -> Request:
        from tokenratio.data.chat import Conversation

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
