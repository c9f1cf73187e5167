"""Where responses come from: a local model or an endpoint."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tokenratio.data.chat import Conversation, Prompt
from tokenratio.data.template import TemplateSettings
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.asking import Request
from tokenratio.evaluation.endpoint import Endpoint, Failure
from tokenratio.evaluation.judges.protocol import digest_of
from tokenratio.models.generation import eos_ids, iterate_samples
from tokenratio.models.response import Response
from tokenratio.models.sampling import stream_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TransformersBackend:
    """A policy in this process; see `sample_responses` for the settings.

    A prompt's id names its random stream, so that a resumed run continues with the samples that it
    would have had, and two policies that are asked the same prompts get the same random draws.
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
        cut: dict[str, Any] = {"max_prompt_length": self.max_prompt_length}
        # Another chat template or end-of-turn token would give other responses.
        tokenizer = self.tokenizer
        reads = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]
        cut["reading"] = digest_of([*reads, eos_ids(self.model, tokenizer, self.template)])[:16]
        cut |= self.template.record(tokenizer)
        return {"backend": "transformers", **_sampling(self), **cut, "seed": self.seed}

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

    All samples of a prompt are requested at once, so that the prompt is paid for once. Servers that
    return fewer are asked again for the rest.

    Attributes:
        seed: each request sends one derived from this and the prompt's id; None sends none, for
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
        given = [
            name
            for name, value in (
                ("chat_template_kwargs", self.template.kwargs),
                ("tools", self.template.tools),
            )
            if value
        ]
        if given and self.endpoint.settings.api == "completions":
            raise TokenRatioError(
                f"{' and '.join(given)} cannot be sent with api=completions, which has no chat "
                "template: use api=chat"
            )
        for name in ("num_samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise TokenRatioError(f"{name} must be at least 1, not {getattr(self, name)}")

    def settings(self) -> dict[str, Any]:
        """What the responses depend on, including the server and its model."""
        identity = self.endpoint.settings.identity()
        given = {"chat_template_kwargs": dict(self.template.kwargs), "tools": self.template.tools}
        template = {name: value for name, value in given.items() if value}
        return {
            "backend": "endpoint",
            **identity,
            **_sampling(self),
            **template,
            "seed": self.seed,
        }

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
        # servers read the seed as a 32-bit number, and some count choices up from it
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


def _sampling(backend: TransformersBackend | EndpointBackend) -> dict[str, Any]:
    names = ("num_samples", "temperature", "top_p", "max_new_tokens")
    return {name: getattr(backend, name) for name in names}
