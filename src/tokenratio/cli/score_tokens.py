"""`tokenratio score-tokens SOURCE`: scores every token of the pairs with two models or prompts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenratio.cli.command import Command
from tokenratio.errors import TokenRatioError
from tokenratio.models.processes import current
from tokenratio.models.template_options import TemplateOptions, template_of
from tokenratio.names import require_at_least
from tokenratio.settings import option

USAGE = """usage: tokenratio score-tokens SOURCE --positive_model MODEL [--flag value ...]

Computes log p+ - log p- of every response token and saves it in a folder, for a run that sets
token_scores to it. SOURCE is a file, a folder, a hub name or a world. Run the command again with
held-out pairs and the same --output to add them. The published setups:

  tis_dpo  p+ is a DPO model, p- a model after DPO on the swapped pairs
  sepo     p+ is a DPO model, p- the model it started from
  t_reg    one model; p+ has a prompt that asks for a better answer, p- one that asks for a worse

The key score_tokens of a recipe does all of this, including training the DPO models.
"""

# The same as `PLACE` of data.contrast, which is slow to import.
_PLACE = "{prompt}"


@dataclass
class ScoreOptions(TemplateOptions):
    """Options of `score-tokens`."""

    output: str = option("token_scores", "Output folder; scores are added to an existing one.")
    positive_model: str = option("", "Model of p+: a hub name, a folder or a GGUF file.")
    negative_model: str | None = option(None, "Model of p-. Default: that of p+.")
    positive_prompt: str = option(_PLACE, "Prompt of p+; {prompt} stands for the pair's.")
    negative_prompt: str = option(_PLACE, "Prompt of p-; {prompt} stands for the pair's.")
    tokenizer: str | None = option(
        None, "Tokenizer of the run that will use the scores. Default: that of p+."
    )
    max_length: int | None = option(2048, "As in the run that will use the scores.")
    max_prompt_length: int | None = option(None, "As in the run that will use the scores.")
    columns: dict[str, Any] | None = option(
        None, "Columns of the data by tokenratio's names: '{prompt: ask, chosen: good}'."
    )
    on_bad_row: Literal["skip", "error"] = option(
        "skip", "What to do with unusable rows: skip (and count them) or error."
    )
    split: str | None = option("train", "Split of a folder or hub data set.")
    batch_size: int = option(8, "Number of pairs per batch.")
    dtype: str = option("float32", "Precision in which the models are loaded.")
    cache_dir: str = option(
        "~/.cache/tokenratio/reference", "Cache of the models' log-probabilities."
    )

    def __post_init__(self) -> None:
        if not self.positive_model:
            raise TokenRatioError("score-tokens needs --positive_model")
        require_at_least(1, batch_size=self.batch_size)
        from tokenratio.data.contrast import check_prompt_template

        for name in ("positive_prompt", "negative_prompt"):
            check_prompt_template(getattr(self, name), f"--{name}")
        same_model = self.negative_model in (None, self.positive_model)
        if same_model and self.positive_prompt == self.negative_prompt:
            raise TokenRatioError(
                "p+ and p- are the same: give --negative_model, or two different prompts"
            )


def score_source(source: str, options: ScoreOptions) -> None:
    """Score every token of a source's pairs and add the scores to the output folder."""
    folder = Path(options.output).expanduser()
    with current().held(folder, instead="choose another --output"):
        _score(source, options, folder)


def _score(source: str, options: ScoreOptions, folder: Path) -> None:
    from tokenratio.cli.contrast_stage import contrast_sides
    from tokenratio.cli.terminal import is_terminal, quiet_libraries
    from tokenratio.data import padding_id, prepare_pairs
    from tokenratio.models.device import default_device, describe_device
    from tokenratio.models.loading import (
        load_model,
        load_tokenizer,
        require_same_vocabulary,
    )
    from tokenratio.training.reference_cache import CacheSettings
    from tokenratio.training.token_contrast import (
        TokenContrast,
        compute_contrast,
        contrast_ingredients,
        summary,
    )

    quiet_libraries()
    before = TokenContrast.open(folder) if (folder / "scores.json").exists() else None
    print(f"device: {describe_device()}; {options.dtype}")
    positive = load_model(options.positive_model, {"dtype": options.dtype})
    negative = positive
    if options.negative_model is not None:
        negative = load_model(options.negative_model, {"dtype": options.dtype})
        require_same_vocabulary(options.positive_model, options.negative_model)
    # Added rows are rendered with the date of the existing ones.
    day = None if before is None else before.template.get("template_date")
    tokenizer = load_tokenizer(options.tokenizer or options.positive_model)
    tokenizer, template = template_of(options, tokenizer, options.positive_model, day=day)
    data = prepare_pairs(
        source,
        tokenizer,
        max_length=options.max_length,
        max_prompt_length=options.max_prompt_length,
        on_bad_row=options.on_bad_row,
        split=options.split,
        template=template,
        columns=options.columns,
    )
    print(data.report.summary())
    sides = contrast_sides(
        data,
        source,
        tokenizer,
        [(positive, options.positive_prompt), (negative, options.negative_prompt)],
        split=options.split,
        template=template,
        columns=options.columns,
    )
    if before is not None:
        before.require_same(contrast_ingredients(*sides))
    settings = CacheSettings(
        root=options.cache_dir,
        batch_size=options.batch_size,
        device=default_device(),
        padding_id=padding_id(tokenizer),
        progress=is_terminal(),
    )
    scores = compute_contrast(data, *sides, settings)
    print(summary(scores.values.values()))
    if before is not None:
        scores = before.joined(scores)
    current().on_first(lambda: scores.save(folder))
    print(f"{len(scores.values)} rows in {folder}; train with --token_scores {folder}")


COMMAND = Command(USAGE, score_source, argument="one source of pairs", options=ScoreOptions)
