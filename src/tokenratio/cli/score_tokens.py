"""`tokenratio score-tokens SOURCE`: what two models or prompts say of every token of the pairs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenratio.cli.command import Command
from tokenratio.errors import TokenRatioError
from tokenratio.models.template_options import TemplateOptions, template_of
from tokenratio.settings import option

USAGE = """usage: tokenratio score-tokens SOURCE --positive_model MODEL [--flag value ...]

Computes log p+ - log p- of every response token and keeps it in a folder, which token_scores names
to the losses that read it. SOURCE is a file, a folder, a hub name or a world; run again with
held-out pairs and the same --output to add them. As published:

  tis_dpo  positive a DPO model, negative one trained by DPO on the pairs swapped
  sepo     positive a DPO model, negative the model it started from
  t_reg    one model, after a prompt that asks for a better answer and one that asks for a worse

A section score_tokens in a recipe does all of this, including training the DPO models.
"""

# `PLACE` of data.contrast, which imports numpy and more.
_PLACE = "{prompt}"


@dataclass
class ScoreOptions(TemplateOptions):
    """Options of `score-tokens`."""

    output: str = option("token_scores", "Folder to write or add to.")
    positive_model: str = option("", "p+: a hub name or a folder.")
    negative_model: str | None = option(None, "p-; default: the same model, with another prompt.")
    positive_prompt: str = option(_PLACE, "What p+ reads; {prompt} is the pair's prompt.")
    negative_prompt: str = option(_PLACE, "What p- reads, likewise.")
    tokenizer: str | None = option(
        None, "Tokenizer of the run that will use the scores; default: p+'s."
    )
    max_length: int | None = option(2048, "As in the run that will use the scores.")
    max_prompt_length: int | None = option(None, "Likewise.")
    columns: dict[str, Any] | None = option(
        None, "Our names to the data's columns: '{prompt: ask, chosen: good}'."
    )
    on_bad_row: Literal["skip", "error"] = option(
        "skip", "Rows that cannot be used: skip (counted) or error."
    )
    split: str | None = option("train", "Split of a folder or hub name.")
    batch_size: int = option(8, "Pairs run at once.")
    dtype: str = option("float32", "Precision the models are loaded in.")
    cache_dir: str = option(
        "~/.cache/tokenratio/reference", "Cache of the models' log-probabilities."
    )

    def __post_init__(self) -> None:
        if not self.positive_model:
            raise TokenRatioError("score-tokens needs --positive_model")
        if self.on_bad_row not in ("skip", "error"):
            raise TokenRatioError(f"on_bad_row must be skip or error, not {self.on_bad_row!r}")
        if self.batch_size < 1:
            raise TokenRatioError(f"batch_size must be at least 1, not {self.batch_size}")
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
    from tokenratio.cli.terminal import is_terminal, quiet_libraries, user_mistakes
    from tokenratio.data import padding_id, prepare_pairs
    from tokenratio.data.contrast import with_prompt_template
    from tokenratio.models.device import default_device
    from tokenratio.models.loading import load_model, load_tokenizer
    from tokenratio.training.token_contrast import (
        ContrastSide,
        TokenContrast,
        compute_contrast,
        ingredients_of,
        summary,
    )

    quiet_libraries()
    folder = Path(options.output).expanduser()
    before = TokenContrast.open(folder) if (folder / "scores.json").exists() else None
    positive = load_model(options.positive_model, {"dtype": options.dtype})
    negative = positive
    if options.negative_model is not None:
        negative = load_model(options.negative_model, {"dtype": options.dtype})
    # Rows that are added are rendered as those that are there.
    day = None if before is None else before.template.get("template_date")
    tokenizer = load_tokenizer(options.tokenizer or options.positive_model)
    tokenizer, template = template_of(options, tokenizer, options.positive_model, day=day)
    _check_tokenizers(options)
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
    sides = []
    for model, prompt in (
        (positive, options.positive_prompt),
        (negative, options.negative_prompt),
    ):
        after = data
        if prompt != _PLACE:
            after = with_prompt_template(
                data,
                source,
                tokenizer,
                prompt,
                split=options.split,
                settings=template,
                columns=options.columns,
            )
        sides.append(ContrastSide(model, after, prompt))
    if before is not None:
        before.require_same(ingredients_of(*sides))
    with user_mistakes(f"cannot write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    scores = compute_contrast(
        data,
        *sides,
        root=options.cache_dir,
        batch_size=options.batch_size,
        device=default_device(),
        padding_id=padding_id(tokenizer),
        progress=is_terminal(),
    )
    print(summary(scores.values.values()))
    if before is not None:
        scores = before.joined(scores)
    scores.save(folder)
    print(f"{len(scores.values)} rows in {folder}; train with --token_scores {folder}")


COMMAND = Command(USAGE, score_source, argument="one source of pairs", options=ScoreOptions)


def _check_tokenizers(options: ScoreOptions) -> None:
    """Two models of one vocabulary size may still number their tokens differently."""
    if options.negative_model is None:
        return
    from tokenratio.models.loading import load_tokenizer

    names = (options.positive_model, options.negative_model)
    first, second = (load_tokenizer(name).get_vocab() for name in names)
    if first != second:
        raise TokenRatioError(
            f"{names[0]} and {names[1]} have different tokenizers: their log-probabilities are of "
            "different tokens"
        )
