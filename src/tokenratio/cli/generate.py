"""`tokenratio generate MODEL --prompts SOURCE`: sampled responses as JSON lines."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tokenratio.cli.arguments import build, fields_of, read_command
from tokenratio.cli.terminal import is_terminal, quiet_libraries
from tokenratio.data.prompts import read_prompts
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.generation import sample_responses
from tokenratio.training.models import load_model, load_tokenizer
from tokenratio.training.run_folder import replace_text

HELP = """usage: tokenratio generate MODEL --prompts SOURCE [--flag value ...]

MODEL is a hub name or a folder (an adapter's too). SOURCE is a file, a folder, a hub name or a
world (world:reviews?prompts=100&split=test) with a column `prompt`.
"""


@dataclass(frozen=True)
class GenerateOptions:
    """What `generate` can be told."""

    prompts: str = field(default="", metadata={"help": "Where the prompts come from."})
    output: str = field(
        default="generations.jsonl", metadata={"help": "File to write; replaced when complete."}
    )
    num_prompts: int | None = field(default=None, metadata={"help": "Only the first so many."})
    num_samples: int = field(default=1, metadata={"help": "Responses per prompt."})
    temperature: float = field(default=1.0, metadata={"help": "0 takes the likeliest token."})
    top_p: float = field(default=1.0, metadata={"help": "Probability mass to sample from."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest response, EOS included."})
    batch_size: int = field(default=64, metadata={"help": "Rows generated at once."})
    seed: int = field(default=0, metadata={"help": "The same call gives the same samples."})
    split: str | None = field(default=None, metadata={"help": "Split of a folder or hub name."})

    def __post_init__(self) -> None:
        if not self.prompts:
            raise TokenRatioError("generate needs --prompts")
        if self.num_prompts is not None and self.num_prompts < 1:
            raise TokenRatioError(f"num_prompts must be at least 1, not {self.num_prompts}")
        output = Path(self.output)
        if output.is_dir() or output.resolve() == Path(self.prompts).resolve():
            raise TokenRatioError(f"--output {output} is a folder or the prompts themselves")


def run(argv: list[str]) -> int:
    """The command; see `HELP`."""
    command = read_command(argv, HELP, fields_of(GenerateOptions), argument="one model")
    if command is None:
        return 0
    name, flags = command
    options = build(GenerateOptions, flags, "generate")
    quiet_libraries()
    prompts = read_prompts(options.prompts, split=options.split)[: options.num_prompts]
    model, tokenizer = load_model(name), load_tokenizer(name)
    settings = asdict(options) | {"model": name}
    del settings["output"]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    samples = sample_responses(
        model,
        tokenizer,
        [prompt for _, prompt in prompts],
        num_samples=options.num_samples,
        temperature=options.temperature,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        seed=options.seed,
        progress=is_terminal(),
    )
    lines = [
        json.dumps(
            {
                "id": origin,
                "prompt": prompt,
                "samples": [
                    {
                        "text": sample.text,
                        "token_ids": list(sample.response_ids),
                        "finish_reason": sample.finish_reason,
                    }
                    for sample in row
                ],
                "settings": digest,
            },
            ensure_ascii=False,
        )
        for (origin, prompt), row in zip(prompts, samples, strict=True)
    ]
    path = Path(options.output)
    replace_text(path, "\n".join(lines) + "\n")
    replace_text(
        path.with_suffix(".settings.json"), json.dumps({digest: settings}, indent=2) + "\n"
    )
    cut = sum(s.finish_reason == "length" for row in samples for s in row)
    total = sum(map(len, samples))
    print(f"{total} responses to {len(prompts)} prompts in {path}; {cut} cut at max_new_tokens")
    return 0
