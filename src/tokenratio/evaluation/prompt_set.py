"""The prompts of an evaluation, and the responses to them that are given rather than sampled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenratio.data import read_rows, source_digest
from tokenratio.data.chat import Prompt, prompt_value
from tokenratio.data.prompts import read_prompts
from tokenratio.data.worlds import World, is_world_source, world_of
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.judges.protocol import digest_of
from tokenratio.evaluation.options import EvaluateOptions
from tokenratio.evaluation.response_files import (
    AnsweredPrompt,
    dataset_responses,
    read_responses,
)


@dataclass(frozen=True)
class PromptSet:
    """What every policy is asked.

    Attributes:
        prompts: `(id, prompt)`, each prompt once.
        world: the synthetic world that they come from, if they do.
    """

    prompts: Sequence[tuple[str, Prompt]] = ()
    world: World | None = None

    def given(self, path: str) -> list[AnsweredPrompt]:
        """A file's responses to these prompts, in their order.

        Raises:
            TokenRatioError: it has no response to one of them, or to another prompt by its id.
        """
        if not self.prompts:
            return []
        found = {generation.id: generation for generation in read_responses(path)}
        missing = [id for id, _ in self.prompts if id not in found]
        if missing:
            raise TokenRatioError(
                f"{path} has no answer to {len(missing)} of {len(self.prompts)} prompts, first "
                f"{missing[0]}"
            )
        for id, prompt in self.prompts:
            if found[id].prompt != prompt:
                raise TokenRatioError(
                    f"{path}: the prompt of {id} differs from the one in this evaluation"
                )
        return [found[id] for id, _ in self.prompts]

    def given_opponents(self, options: EvaluateOptions) -> list[AnsweredPrompt] | None:
        """What judges compare with, if it is a column or a file; None if it is a policy.

        Raises:
            TokenRatioError: see `given` and `dataset_responses`.
        """
        against = options.against
        if not self.prompts:
            return None
        if against.startswith("column:"):
            given = dataset_responses(
                str(options.prompts),
                column=against.removeprefix("column:"),
                split=options.split,
                columns=options.columns,
            )
            asked = {id for id, _ in self.prompts}
            return [generation for generation in given if generation.id in asked]
        return self.given(against) if against.endswith(".jsonl") else None


def read_prompt_set(options: EvaluateOptions, report: Callable[[str], None]) -> PromptSet:
    """The prompts that the options name; none if they name none.

    Raises:
        TokenRatioError: the source cannot be read.
    """
    source = options.prompts
    if source is None:
        return PromptSet()
    rows = read_prompts(source, split=options.split, columns=options.columns)
    # Rows with the same prompt are not independent draws.
    first: dict[str, tuple[str, Prompt]] = {}
    for id, prompt in rows:
        first.setdefault(digest_of(prompt_value(prompt)), (id, prompt))
    if len(first) < len(rows):
        report(f"{len(rows)} rows have {len(first)} different prompts: each is asked once")
    world = world_of(source) if is_world_source(source) else None
    return PromptSet(list(first.values())[: options.num_prompts], world)


def content_digests(prompts: PromptSet, options: EvaluateOptions) -> dict[str, str]:
    """A digest of each prompt and pair by `prompt ID` or `pair ID`.

    Ids of two evaluations may be the same where the texts are not.
    """
    digests = {
        f"prompt {id}": digest_of(prompt_value(prompt))[:16] for id, prompt in prompts.prompts
    }
    if options.pairs is not None:
        rows = read_rows(options.pairs, split=options.split)
        digests |= {f"pair {row.origin}": source_digest([row])[:16] for row in rows}
    return digests
