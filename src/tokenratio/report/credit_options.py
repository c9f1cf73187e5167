"""The settings of the token-credit viewer. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.options import DTYPES
from tokenratio.models.template_options import TemplateOptions
from tokenratio.names import require_at_least, require_choice
from tokenratio.settings import option


@dataclass
class InspectOptions(TemplateOptions):
    """Settings of `inspect`, in Python or as flags."""

    reference: str | None = option(
        None, "The model that the policies are compared with. Default: what the run recorded."
    )
    data: str | None = option(
        None,
        "Preference pairs: a file, folder, hub name or world. Default: the run's held-out pairs, "
        "or else its training pairs.",
    )
    output: str = option("credit.html", "The page to write.")
    jsonl: str | None = option(None, "Also write the figures to this file, one object a pair.")
    terminal: bool = option(False, "Print the pairs as coloured lanes instead of writing a page.")
    losses: list[str] | None = option(
        None,
        "Methods to show, such as '[dpo, tbpo_a]'. Default: the run's own, tbpo_a, tbpo_q where a "
        "run has its baseline, tdpo1 and dpo.",
    )
    beta: float | None = option(
        None, "β of all methods that have one. Default: the run's; the published one of others."
    )
    checkpoints: bool = option(False, "Also show every complete checkpoint of a run.")
    num_pairs: int = option(200, "Use at most N pairs, drawn by their content.")
    top: int = option(5, "Alternatives of each model at each token; 0 leaves them out.")
    world: str | None = option(
        None, "World that knows what tokens are worth, such as world:sentiment. Default: --data's."
    )
    split: str | None = option(
        None, "Split of a folder or hub data set. Default: test, else train, else the only one."
    )
    columns: dict[str, Any] | None = option(
        None, "Columns of the data by tokenratio's names: '{prompt: ask, chosen: good}'."
    )
    max_length: int | None = option(
        None, "Longest row in tokens. Default: as in the run, or else 2048."
    )
    max_prompt_length: int | None = option(
        None, "Longest prompt in tokens, cut on the left. Default: as in the run."
    )
    batch_size: int = option(8, "Number of responses per batch.")
    dtype: str = option("auto", "Precision of the models; auto is float32.")

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, DTYPES)
        require_at_least(1, num_pairs=self.num_pairs, batch_size=self.batch_size)
        require_at_least(0, top=self.top)
        if self.losses is not None and not 0 < len(self.losses) == len({*self.losses}):
            raise TokenRatioError(
                f"losses must name at least one method, each once, not {self.losses}"
            )
        if self.world is not None and not self.world.startswith("world:"):
            raise TokenRatioError(
                f"world must be a name such as world:sentiment, not {self.world!r}"
            )
        if self.beta is not None and not 0 < self.beta < float("inf"):
            raise TokenRatioError(f"beta must be positive and finite, not {self.beta}")
