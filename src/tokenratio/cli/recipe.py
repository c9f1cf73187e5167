"""Recipes: a YAML file whose keys are the fields of `Recipe` and of `TokenRatioConfig`."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tokenratio.cli.arguments import Field, build, check_known, fields_of, read_yaml
from tokenratio.errors import TokenRatioError
from tokenratio.training.config import TokenRatioConfig


@dataclass(frozen=True)
class Recipe:
    """What a recipe says beside the settings of the run: models, data, stages.

    Raises:
        TokenRatioError: neither or both of `model` and `model_config`, or no data.
    """

    model: str | None = field(
        default=None, metadata={"help": "Starting policy: a hub name or a folder."}
    )
    model_config: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Starting policy from a transformers config: {model_type: llama, ...}."},
    )
    tokenizer: str | dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "A hub name or folder, world:NAME, or {byte_level_bpe: VOCABULARY SIZE}, "
            "trained from the data. Default: the model's."
        },
    )
    ref_model: str | None = field(
        default=None, metadata={"help": "Reference; default: the starting policy."}
    )
    train_dataset: str | None = field(
        default=None, metadata={"help": "A file, a folder, a hub name or a world."}
    )
    eval_dataset: str | None = field(default=None, metadata={"help": "Held-out pairs, likewise."})
    peft: dict[str, Any] | None = field(
        default=None, metadata={"help": "LoRA: the arguments of peft.LoraConfig."}
    )
    sft: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "A first stage of SFT on the chosen responses: its own settings."},
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Resolve everything, print it and stop."}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Replace the run that output_dir holds."}
    )

    def __post_init__(self) -> None:
        if (self.model is None) == (self.model_config is None):
            raise TokenRatioError("a recipe needs either model or model_config")
        if self.train_dataset is None:
            raise TokenRatioError("a recipe needs train_dataset")
        if self.model_config is not None:
            if "model_type" not in self.model_config:
                raise TokenRatioError("model_config needs model_type, for example llama")
            if self.tokenizer is None:
                raise TokenRatioError("model_config needs a tokenizer")
        if isinstance(self.tokenizer, dict):
            check_known(self.tokenizer, ["byte_level_bpe"], "key in tokenizer")
            size = self.tokenizer.get("byte_level_bpe")
            if isinstance(size, bool) or not isinstance(size, int):
                raise TokenRatioError(f"byte_level_bpe must be a number of tokens, not {size!r}")


_RECIPE_KEYS = tuple(f.name for f in fields(Recipe))
# A stage of its own may have its own data, and any setting of a run.
_SFT_KEYS = ("train_dataset", "eval_dataset")


def recipe_fields() -> dict[str, Field]:
    """Every key a recipe or a flag of `train` may name."""
    return fields_of(TokenRatioConfig, Recipe)


@dataclass(frozen=True)
class Stage:
    """One training run: its settings and its data."""

    args: TokenRatioConfig
    train_dataset: str
    eval_dataset: str | None


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe with every default filled in: an optional SFT stage, then the run itself."""

    recipe: Recipe
    sft: Stage | None
    main: Stage


def resolve(path: str, flags: dict[str, Any], defaults: dict[str, Any]) -> ResolvedRecipe:
    """Read a recipe; flags win over it, it wins over `defaults`.

    Raises:
        TokenRatioError: an unknown key, naming the nearest right one; a value that does not fit.
    """
    values = read_yaml(path)
    check_known(values, recipe_fields(), f"key in {path}")
    values |= flags
    recipe = build(Recipe, {k: v for k, v in values.items() if k in _RECIPE_KEYS}, path)
    settings = {k: v for k, v in values.items() if k not in _RECIPE_KEYS}
    loss = str(settings.get("loss", "tbpo_a"))
    base = Path("runs") / Path(path).stem
    # Each method has its own folder, so that one recipe run with two losses overwrites nothing.
    settings = {"output_dir": str(base / loss), **defaults, **_given(settings)}
    main = Stage(_config(settings, path), str(recipe.train_dataset), recipe.eval_dataset)
    if recipe.sft is None:
        return ResolvedRecipe(recipe, None, main)
    if recipe.sft.get("loss", "sft") != "sft":
        raise TokenRatioError(f"the sft stage of {path} cannot have loss {recipe.sft['loss']!r}")
    check_known(recipe.sft, [*fields_of(TokenRatioConfig), *_SFT_KEYS], f"key in sft of {path}")
    own = {k: v for k, v in recipe.sft.items() if k not in _SFT_KEYS}
    # Only what belongs to the machine and the data carries over; the rest is another kind of run.
    carried = ("max_length", "max_prompt_length", "on_bad_row", "seed", "use_cpu", "bf16")
    settings = {
        "output_dir": str(base / "sft"),
        "optim": "adamw_torch",
        "learning_rate": 2e-5,
        "max_grad_norm": 1.0,
        "gradient_accumulation_steps": 1,
        **defaults,
        **{k: v for k, v in settings.items() if k in carried},
        **_given(own),
        "loss": "sft",
    }
    data = str(recipe.sft.get("train_dataset", recipe.train_dataset))
    sft = Stage(_config(settings, f"sft of {path}"), data, recipe.sft.get("eval_dataset"))
    return ResolvedRecipe(recipe, sft, main)


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    """Without an output_dir of null, which means the default."""
    return {k: v for k, v in settings.items() if k != "output_dir" or v is not None}


def _config(settings: dict[str, Any], where: str) -> TokenRatioConfig:
    return build(TokenRatioConfig, settings, where)
