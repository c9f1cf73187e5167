"""The settings of an evaluation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.judges.protocol import JudgeSettings
from tokenratio.evaluation.judges.registry import JUDGES, judge_settings
from tokenratio.models.template_options import TemplateOptions
from tokenratio.names import require_choice
from tokenratio.settings import check_known, option

# What `dtype` may be. Here because torch, which has the types, is slow to import.
DTYPES = ("auto", "float32", "bfloat16", "float16")
REFERENCE = "reference"  # the name of the reference's folder, and in --against


@dataclass
class EvaluateOptions(TemplateOptions):
    """Settings of `evaluate`, in Python, a recipe or flags."""

    output_dir: str = option("evaluation", "Output folder.")
    runs: list[str] | None = option(None, "In a recipe: the runs, as on the command line.")
    reference: str | None = option(
        None,
        "The policy that KL and implicit rewards are relative to; it is evaluated too. "
        "Default: the reference of the first run.",
    )
    prompts: str | None = option(None, "Prompts to answer: a file, folder, hub name or world.")
    split: str | None = option("test", "Split of a folder or hub data set.")
    columns: dict[str, Any] | None = option(
        None, "Columns of the data by tokenratio's names: '{prompt: ask, chosen: good}'."
    )
    num_prompts: int | None = option(None, "Use only the first N prompts.")
    num_samples: int = option(5, "Responses per prompt.")
    temperature: float = option(1.0, "Sampling temperature; 0 is greedy.")
    top_p: float = option(1.0, "Probability mass to sample from.")
    max_new_tokens: int = option(128, "Maximum number of tokens in a response, including EOS.")
    seed: int = option(0, "Seed of the samples.")
    batch_size: int = option(16, "Number of rows per batch.")
    dtype: str = option(
        "auto",
        "Precision of the policies: float32, bfloat16 or float16. auto samples in bfloat16 where "
        "the hardware multiplies it faster, and measures in float32.",
    )
    pairs: str | None = option(None, "Held-out pairs, for the implicit reward's accuracy.")
    subset_column: str | None = option(None, "Column of the pairs that names their subset.")
    max_length: int | None = option(2048, "Longest row of a pair, in tokens.")
    max_prompt_length: int | None = option(
        None, "Longest prompt, in tokens, cut on the left; set it as in training."
    )
    beta: float | None = option(
        None, "Scale of the implicit reward. Default: that of each run, or 0.1."
    )
    against: str = option(
        REFERENCE,
        "What judges compare with: reference, another run's name, a file of generations, or "
        "column:NAME of the prompts' source, such as column:chosen.",
    )
    suite: str | None = option(
        None, "General ability: open-llm-v1, or a local task file of lm-eval."
    )
    judges: dict[str, Any] | None = option(
        None,
        f"Judges by name ({', '.join(JUDGES)}), each with its settings; see docs/evaluation.md. "
        "Default: gold if the prompts come from a world.",
    )

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, DTYPES)
        if not (self.prompts or self.pairs or self.suite):
            raise TokenRatioError("evaluate needs --prompts, --pairs or --suite")
        at_least_one = ("num_samples", "max_new_tokens", "batch_size", "max_prompt_length")
        for name in (*at_least_one, "num_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TokenRatioError(f"{name} must be at least 1, not {value}")
        if not 0 <= self.temperature < math.inf:
            raise TokenRatioError(f"temperature must be 0 or positive, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise TokenRatioError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.beta is not None and not self.beta > 0:
            raise TokenRatioError(f"beta must be positive, not {self.beta}")
        folder = Path(self.output_dir)
        first = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not first.is_dir():
            raise TokenRatioError(f"output_dir {folder}: {first} is a file")
        judges = self.judge_settings()
        if self.judges and self.prompts is None:
            raise TokenRatioError("judges compare responses: give --prompts")
        if self.against != REFERENCE and not judges:
            raise TokenRatioError(f"--against {self.against} has no effect without --judges")

    def judge_settings(self) -> dict[str, JudgeSettings]:
        """The settings of each judge by its name, including the default judge."""
        from tokenratio.data.worlds import is_world_source

        judges = self.judges
        if judges is None:
            judges = {"gold": {}} if is_world_source(self.prompts or "") else {}
        return {name: judge_settings(name, values) for name, values in judges.items()}

    def check_policies(self, names: Sequence[str]) -> None:
        """Check, before anything is computed, that the policies include those the settings need.

        Args:
            names: of all policies, including the reference if there is one.
        Raises:
            TokenRatioError: the reference or the policy to compare with is missing.
        """
        has_reference = REFERENCE in names
        missing = "no run recorded what it started from: give --reference"
        if self.pairs is not None and not has_reference:
            raise TokenRatioError(f"pairs need a reference, and {missing}")
        if self.against == REFERENCE:
            if self.judges and not has_reference:
                raise TokenRatioError(
                    f"judges compare with the reference, and {missing}, or another --against"
                )
        elif not self.against.startswith("column:") and not self.against.endswith(".jsonl"):
            check_known([self.against], names, "run in --against", listed="")
