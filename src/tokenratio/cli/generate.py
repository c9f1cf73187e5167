"""`tokenratio generate MODEL --prompts SOURCE`: writes sampled responses as JSON lines."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenratio.cli.command import Command
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.budget import Budget
from tokenratio.evaluation.endpoint import Endpoint, EndpointSettings
from tokenratio.evaluation.options import DTYPES
from tokenratio.models.template_options import TemplateOptions, template_of
from tokenratio.names import require_at_least, require_choice
from tokenratio.settings import Field, build, fields_of, option

if TYPE_CHECKING:
    from tokenratio.evaluation.backends import EndpointBackend, TransformersBackend
    from tokenratio.evaluation.response_files import AnsweredPrompt

USAGE = """usage: tokenratio generate MODEL --prompts SOURCE [--flag value ...]

MODEL is a hub name, a folder, a GGUF file or package:smollm2, of a model or an adapter; with
--endpoint, the model's name on that server. SOURCE is a file, a folder, a hub name or a world, such
as world:reviews?prompts=100&split=test, with a column `prompt`.

Responses are written as they arrive. Run the same command again to resume; responses already in the
output are kept. With --endpoint, the cost is estimated before the first request.
"""

# A server has its own chat template and date.
_LOCAL_FLAGS = ("batch_size", "dtype", "chat_template", "template_date")


@dataclass
class GenerateOptions(TemplateOptions):
    """Settings of `generate`, apart from those that apply only to endpoints."""

    prompts: str = option("", "Source of the prompts.")
    output: str = option(
        "generations.jsonl", "Output file. If it was made with the same settings, it is resumed."
    )
    overwrite: bool = option(False, "Replace an existing output.")
    num_prompts: int | None = option(None, "Use only the first N prompts.")
    num_samples: int = option(1, "Number of responses per prompt.")
    temperature: float = option(1.0, "Sampling temperature; 0 is greedy.")
    top_p: float = option(1.0, "Probability mass to sample from.")
    max_new_tokens: int = option(256, "Maximum number of tokens in a response, including EOS.")
    batch_size: int = option(64, "Samples generated at once; best a multiple of num_samples.")
    dtype: str = option(
        "auto",
        "Precision of the model: float32, bfloat16 or float16. auto is bfloat16 where the hardware "
        "multiplies it faster, else float32.",
    )
    seed: int | None = option(0, "Seed of the samples; null sends no seed to an endpoint.")
    split: str | None = option(None, "Split of a folder or hub data set.")
    columns: dict[str, Any] | None = option(
        None, "Columns of the data by tokenratio's names: '{prompt: ask, chosen: good}'."
    )
    endpoint: str | None = option(
        None, "Generate with the server at this address, such as http://localhost:8000/v1."
    )

    def __post_init__(self) -> None:
        if not self.prompts:
            raise TokenRatioError("generate needs --prompts")
        require_at_least(1, num_prompts=self.num_prompts)
        require_choice("dtype", self.dtype, DTYPES)
        output = Path(self.output)
        if output.is_dir() or output.resolve() == Path(self.prompts).resolve():
            raise TokenRatioError(f"--output {output} is a folder or the file of the prompts")


def _endpoint_fields() -> dict[str, Field]:
    """The settings of an endpoint and its budget, except its address and model."""
    fields = fields_of(EndpointSettings, Budget)
    return {name: field for name, field in fields.items() if name not in ("base_url", "model")}


def generate_responses(name: str, flags: Mapping[str, str | bool]) -> None:
    """Sample responses from a model or an endpoint into a file."""
    own = fields_of(GenerateOptions)
    options = build(GenerateOptions, {k: v for k, v in flags.items() if k in own}, "generate")
    endpoint_flags = {flag: value for flag, value in flags.items() if flag not in own}
    if options.endpoint is None:
        for flag in endpoint_flags:
            raise TokenRatioError(f"--{flag} applies only to endpoints: give --endpoint")
    for flag in _LOCAL_FLAGS if options.endpoint is not None else ():
        if flag in flags:
            raise TokenRatioError(
                f"--{flag} applies only to local models; remove it when using --endpoint"
            )
    endpoint = (
        None if options.endpoint is None else _connect(name, options.endpoint, endpoint_flags)
    )
    from tokenratio.cli.outputs import check_output
    from tokenratio.cli.terminal import quiet_libraries
    from tokenratio.data import describe_splits
    from tokenratio.data.prompts import read_prompts
    from tokenratio.evaluation.backends import TimedBackend
    from tokenratio.evaluation.response_files import write_responses

    quiet_libraries()
    path = Path(options.output)
    check_output(path)
    prompts = read_prompts(options.prompts, split=options.split, columns=options.columns)
    prompts = prompts[: options.num_prompts]
    for line in describe_splits(options.prompts, split=options.split):
        print(line)
    backend, settings = _backend(name, options, endpoint)
    settings |= {"prompts": options.prompts, "split": options.split}
    timed = TimedBackend(backend)
    generations = write_responses(prompts, timed, path, settings, overwrite=options.overwrite)
    rate = timed.rate()
    print(_describe(generations, path) + (rate and f"; {rate}"))


COMMAND = Command(
    USAGE,
    generate_responses,
    argument="one model",
    fields=lambda: fields_of(GenerateOptions) | _endpoint_fields(),
)


def _connect(model: str, address: str, flags: Mapping[str, str | bool]) -> Endpoint:
    """The endpoint of a model, with its budget."""
    from tokenratio.cli.terminal import is_terminal

    limits = fields_of(Budget)
    how = {flag: value for flag, value in flags.items() if flag not in limits}
    settings = build(EndpointSettings, {"base_url": address, "model": model, **how}, "generate")
    budget = build(Budget, {k: v for k, v in flags.items() if k in limits}, "generate")
    return Endpoint(settings, budget=budget, progress=is_terminal())


def _backend(
    name: str, options: GenerateOptions, endpoint: Endpoint | None
) -> tuple["TransformersBackend | EndpointBackend", dict[str, Any]]:
    """What generates the responses, and the settings they depend on, apart from the prompts."""
    from tokenratio.cli.terminal import is_terminal
    from tokenratio.data.template import TemplateSettings
    from tokenratio.evaluation.backends import EndpointBackend, TransformersBackend
    from tokenratio.evaluation.judges.bradley_terry import weights_digest
    from tokenratio.models.device import (
        default_device,
        describe_device,
        describe_sampling,
        sampling_dtype,
    )
    from tokenratio.models.loading import load_model, load_tokenizer

    names = ("num_samples", "temperature", "top_p", "max_new_tokens")
    sampling: dict[str, Any] = {each: getattr(options, each) for each in names}
    if endpoint is not None:
        template = TemplateSettings.of(options.chat_template_kwargs, options.tools)
        server = EndpointBackend(endpoint, **sampling, seed=options.seed, template=template)
        return server, server.settings()
    if options.seed is None:
        raise TokenRatioError("seed null applies only to endpoints: give a whole number")
    from tokenratio.evaluation.response_files import date_of_responses

    print(f"device: {describe_device()}; {describe_sampling(options.dtype)}")
    dtype = sampling_dtype(options.dtype)
    model = load_model(name, {"dtype": dtype})
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
    # With the weights' digest: the folder may be retrained later.
    weights = {"dtype": dtype, "weights": weights_digest(model)}
    return backend, {"model": name, **weights, **backend.settings()}


def _describe(generations: "Sequence[AnsweredPrompt]", path: Path) -> str:
    ends = Counter(s.finish_reason for generation in generations for s in generation.samples)
    line = f"{ends.total()} responses to {len(generations)} prompts in {path}; "
    line += f"{ends.pop('length', 0)} cut at max_new_tokens"
    ends.pop("eos", None)
    others = [f", {num} ended by {reason}" for reason, num in ends.most_common()]
    return line + "".join(others)
