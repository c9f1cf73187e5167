"""`tokenratio generate MODEL --prompts SOURCE`: sampled responses as JSON lines."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenratio.cli.command import Command
from tokenratio.cli.endpoint_options import (
    ENDPOINT_FLAGS,
    EndpointOptions,
    refuse_idle,
    split_flags,
)
from tokenratio.errors import TokenRatioError
from tokenratio.models.template_options import TemplateOptions, template_of
from tokenratio.settings import build, fields_of, option

if TYPE_CHECKING:
    from tokenratio.data.chat import Prompt
    from tokenratio.evaluation.backends import EndpointBackend, TransformersBackend
    from tokenratio.evaluation.response_files import AnsweredPrompt, Backend
    from tokenratio.models.response import Response

USAGE = """usage: tokenratio generate MODEL --prompts SOURCE [--flag value ...]

MODEL is a hub name or a folder (also of an adapter); with --endpoint, the model's name on that
server. SOURCE is a file, a folder, a hub name or a world
(world:reviews?prompts=100&split=test) with a column `prompt`.

Responses are written as they arrive. Run the same command again to resume: nothing that the output
already holds is generated twice. The cost of an endpoint is estimated before the first request.
"""

# A server has its own chat template, and its own clock.
_LOCAL_FLAGS = ("batch_size", "dtype", "chat_template", "template_date")


@dataclass
class GenerateOptions(TemplateOptions):
    """What `generate` can be told, the endpoint apart."""

    prompts: str = option("", "Source of the prompts.")
    output: str = option(
        "generations.jsonl", "Output file. If it was made with the same settings, it is resumed."
    )
    overwrite: bool = option(False, "Replace an existing output.")
    num_prompts: int | None = option(None, "Use only the first N prompts.")
    num_samples: int = option(1, "Responses per prompt.")
    temperature: float = option(1.0, "Sampling temperature; 0 is greedy.")
    top_p: float = option(1.0, "Probability mass to sample from.")
    max_new_tokens: int = option(256, "Most tokens in a response, EOS included.")
    batch_size: int = option(64, "Prompts generated at once.")
    dtype: str = option("float32", "Precision the model is loaded in.")
    seed: int | None = option(0, "Seed of the samples; null sends none to an endpoint.")
    split: str | None = option(None, "Split of a folder or hub name.")
    columns: dict[str, Any] | None = option(
        None, "Our names to the data's columns: '{prompt: ask, chosen: good}'."
    )

    def __post_init__(self) -> None:
        if not self.prompts:
            raise TokenRatioError("generate needs --prompts")
        if self.num_prompts is not None and self.num_prompts < 1:
            raise TokenRatioError(f"num_prompts must be at least 1, not {self.num_prompts}")
        output = Path(self.output)
        if output.is_dir() or output.resolve() == Path(self.prompts).resolve():
            raise TokenRatioError(f"--output {output} is a folder or the prompts themselves")


def generate(name: str, flags: dict[str, str | bool]) -> None:
    """Write the responses of a model, loaded here or behind an endpoint, to the output file."""
    own, remote = split_flags(flags)
    options = build(GenerateOptions, own, "generate")
    endpoint = build(EndpointOptions, remote, "generate")
    if endpoint.endpoint is None:
        refuse_idle(flags, ENDPOINT_FLAGS, "is of an endpoint: give --endpoint")
    else:
        refuse_idle(flags, _LOCAL_FLAGS, "is of a model loaded here, not of an endpoint")
    from tokenratio.cli.outputs import check_output
    from tokenratio.cli.recipe_models import say_splits
    from tokenratio.cli.terminal import quiet_libraries
    from tokenratio.data.prompts import read_prompts
    from tokenratio.evaluation.response_files import write_responses

    quiet_libraries()
    path = Path(options.output)
    check_output(path)
    prompts = read_prompts(options.prompts, split=options.split, columns=options.columns)
    prompts = prompts[: options.num_prompts]
    say_splits(options.prompts, options.split)
    backend, settings = _backend(name, options, endpoint)
    settings |= {"prompts": options.prompts, "split": options.split}
    timed = _Timed(backend)
    generations = write_responses(prompts, timed, path, settings, overwrite=options.overwrite)
    print(_describe(generations, path) + timed.rate())


COMMAND = Command(
    USAGE,
    generate,
    argument="one model",
    fields=lambda: fields_of(GenerateOptions, EndpointOptions),
)


def _backend(
    name: str, options: GenerateOptions, endpoint: EndpointOptions
) -> tuple["TransformersBackend | EndpointBackend", dict[str, Any]]:
    """What answers, and all that its answers depend on but the prompts."""
    from tokenratio.cli.terminal import is_terminal
    from tokenratio.data.template import TemplateSettings
    from tokenratio.evaluation.backends import EndpointBackend, TransformersBackend
    from tokenratio.evaluation.judges.bradley_terry import weights_digest
    from tokenratio.models.device import default_device
    from tokenratio.models.loading import load_model, load_tokenizer

    names = ("num_samples", "temperature", "top_p", "max_new_tokens")
    sampling: dict[str, Any] = {each: getattr(options, each) for each in names}
    if endpoint.endpoint is not None:
        told = TemplateSettings.of(options.chat_template_kwargs, options.tools)
        connection = endpoint.connect(name)
        server = EndpointBackend(connection, **sampling, seed=options.seed, template=told)
        return server, server.settings()
    if options.seed is None:
        raise TokenRatioError("seed null is for endpoints: a model loaded here needs a number")
    from tokenratio.evaluation.response_files import date_of_responses

    model = load_model(name, {"dtype": options.dtype})
    model.to(default_device())
    day = None if options.overwrite else date_of_responses(Path(options.output))
    tokenizer, template = template_of(options, load_tokenizer(name), name, day=day)
    backend = TransformersBackend(
        model,
        tokenizer,
        template=template,
        **sampling,
        seed=options.seed,
        batch_size=options.batch_size,
        progress=is_terminal(),
    )
    # The weights too: a folder may have been trained again since.
    return backend, {"model": name, "weights": weights_digest(model), **backend.settings()}


class _Timed:
    """A backend, and how many tokens it wrote in how many seconds, where it tells the tokens."""

    def __init__(self, backend: "Backend") -> None:
        self._backend = backend
        self._num_tokens, self._seconds = 0, 0.0

    def __call__(
        self, prompts: "Sequence[tuple[str, Prompt]]"
    ) -> "Iterator[tuple[str, Sequence[Response]]]":
        started = time.perf_counter()
        for id, samples in self._backend(prompts):
            self._num_tokens += sum(len(sample.token_ids or ()) for sample in samples)
            self._seconds = time.perf_counter() - started
            yield id, samples

    def rate(self) -> str:
        """In words; empty where nothing was written, or only the server knows how much."""
        if not self._num_tokens:
            return ""
        rate = self._num_tokens / max(self._seconds, 1e-9)
        return f"; {self._num_tokens:,} tokens in {self._seconds:.1f} s ({rate:,.0f}/s)"


def _describe(generations: "Sequence[AnsweredPrompt]", path: Path) -> str:
    ends = Counter(s.finish_reason for generation in generations for s in generation.samples)
    said = f"{ends.total()} responses to {len(generations)} prompts in {path}; "
    said += f"{ends.pop('length', 0)} cut at max_new_tokens"
    ends.pop("eos", None)
    others = [f", {num} ended by {reason}" for reason, num in ends.most_common()]
    return said + "".join(others)
