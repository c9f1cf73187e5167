"""Where responses come from: a local model or an endpoint."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tokenratio.data.chat import Conversation, Prompt
from tokenratio.data.template import TemplateSettings
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.endpoint import Endpoint, Failure
from tokenratio.evaluation.judges.protocol import digest_of
from tokenratio.evaluation.openai_api import Request
from tokenratio.evaluation.response_files import Backend
from tokenratio.models.generation import eos_ids, iterate_samples
from tokenratio.models.processes import current
from tokenratio.models.response import Response
from tokenratio.models.sampling import stream_seed
from tokenratio.names import require_at_least

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TransformersBackend:
    """A policy in this process; see `sample_responses` for the settings.

    A prompt's id selects its random stream, so that a resumed run draws the samples that it would
    have drawn, and policies with the same prompts get the same random draws.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    max_new_tokens: int
    max_prompt_length: int | None = None
    template: TemplateSettings = field(default_factory=TemplateSettings)
    num_samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 64
    progress: bool = False

    def settings(self) -> dict[str, Any]:
        """What the responses depend on, except the weights; they do not depend on `batch_size`."""
        tokenizer = self.tokenizer
        reading = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]
        reading.append(eos_ids(self.model, tokenizer, self.template))
        return {
            "backend": "transformers",
            **_sampling(self),
            "max_prompt_length": self.max_prompt_length,
            "reading": digest_of(reading)[:16],
            **self.template.record(tokenizer),
            "seed": self.seed,
        }

    def __call__(
        self, prompts: Sequence[tuple[str, Prompt]]
    ) -> Iterator[tuple[str, list[Response]]]:
        ids = [id for id, _ in prompts]
        finished = iterate_samples(
            self.model,
            self.tokenizer,
            [prompt for _, prompt in prompts],
            num_samples=self.num_samples,
            temperature=self.temperature,
            top_p=self.top_p,
            max_new_tokens=self.max_new_tokens,
            max_prompt_length=self.max_prompt_length,
            template=self.template,
            batch_size=self.batch_size,
            seed=self.seed,
            keys=ids,
            progress=self.progress,
        )
        for index, samples in finished:
            yield ids[index], samples


@dataclass(frozen=True)
class EndpointBackend:
    """A policy behind an OpenAI-compatible endpoint.

    All samples of a prompt are requested at once, so that the prompt is paid for once.

    Attributes:
        seed: each request sends a seed derived from this and the prompt's id; None sends none, for
            servers that do not support it.
        template: its arguments and tools are sent with every prompt; the prompt's own take
            precedence. The server renders, with its own clock.
    """

    endpoint: Endpoint
    max_new_tokens: int
    num_samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = 0
    template: TemplateSettings = field(default_factory=TemplateSettings)

    def __post_init__(self) -> None:
        if current().count > 1:
            raise TokenRatioError(
                "a server is asked by one process: start the command without torchrun or "
                "accelerate launch, and raise --concurrency"
            )
        given = self._template_settings()
        if given and self.endpoint.settings.api == "completions":
            raise TokenRatioError(
                f"{' and '.join(given)} cannot be sent with api=completions, which has no chat "
                "template: use api=chat"
            )
        require_at_least(1, num_samples=self.num_samples, max_new_tokens=self.max_new_tokens)

    def _template_settings(self) -> dict[str, Any]:
        given = {"chat_template_kwargs": dict(self.template.kwargs), "tools": self.template.tools}
        return {name: value for name, value in given.items() if value}

    def settings(self) -> dict[str, Any]:
        """What the responses depend on, including the server and its model."""
        settings = {"backend": "endpoint", **self.endpoint.settings.identity(), **_sampling(self)}
        return {**settings, **self._template_settings(), "seed": self.seed}

    def __call__(
        self, prompts: Sequence[tuple[str, Prompt]]
    ) -> Iterator[tuple[str, list[Response]]]:
        failed: dict[str, str] = {}
        for request, answer in self.endpoint.ask([self._request(*prompt) for prompt in prompts]):
            if isinstance(answer, Failure):
                failed[request.id] = answer.reason
            else:
                yield request.id, list(answer)
        if failed:
            id, reason = next(iter(failed.items()))
            raise TokenRatioError(f"{len(failed)} prompts got no answer, first {id}: {reason}")

    def _request(self, id: str, prompt: Prompt) -> Request:
        # Servers read it as a 32-bit number, and some add the index of the choice.
        seed = None if self.seed is None else stream_seed(self.seed, id, 0) % 2**30
        return Request(
            id,
            self._with_template(prompt),
            max_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            num_choices=self.num_samples,
            seed=seed,
        )

    def _with_template(self, prompt: Prompt) -> Prompt:
        """The prompt with the template arguments and tools of this backend."""
        template = self.template
        if not (template.kwargs or template.tools):
            return prompt
        if isinstance(prompt, str):
            prompt = Conversation([{"role": "user", "content": prompt}])
        return Conversation(
            prompt.messages,
            prompt.tools or template.tools,
            {**template.kwargs, **prompt.template_kwargs},
        )


class TimedBackend:
    """A backend that measures its tokens per second, if it returns token ids."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._num_tokens, self._seconds = 0, 0.0

    def __call__(
        self, prompts: Sequence[tuple[str, Prompt]]
    ) -> Iterator[tuple[str, Sequence[Response]]]:
        started = time.perf_counter()
        for id, samples in self._backend(prompts):
            self._num_tokens += sum(len(sample.token_ids or ()) for sample in samples)
            self._seconds = time.perf_counter() - started
            yield id, samples

    def rate(self) -> str:
        """Tokens, seconds and their quotient as text; empty if no tokens were counted.

        Of all processes (`processes.current`), each of which must call it.
        """
        tokens, seconds = zip(*current().gather((self._num_tokens, self._seconds)), strict=True)
        if not sum(tokens):
            return ""
        rate = sum(tokens) / max(*seconds, 1e-9)
        return f"{sum(tokens):,} tokens in {max(seconds):.1f} s ({rate:,.0f}/s)"


def _sampling(backend: TransformersBackend | EndpointBackend) -> dict[str, Any]:
    names = ("num_samples", "temperature", "top_p", "max_new_tokens")
    return {name: getattr(backend, name) for name in names}
