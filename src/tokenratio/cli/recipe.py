"""`tokenratio train RECIPE.yaml`: reads a recipe, which `train` or `dry_run` then runs.

A recipe is a YAML file with the fields of `Recipe` and `TokenRatioConfig` as keys. They are checked
before torch is imported, so that a misspelt one is reported at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tokenratio.cli.command import Command
from tokenratio.cli.declared import declared_fields
from tokenratio.cli.training_headings import TRAINING_HEADINGS
from tokenratio.errors import TokenRatioError
from tokenratio.models.template_options import TEMPLATE_FLAGS
from tokenratio.settings import Field, build, check_known, convert, fields_of, option
from tokenratio.training.method_settings import PUBLISHED_CONTRASTS, MethodSettings
from tokenratio.yaml_text import read_yaml

if TYPE_CHECKING:
    from tokenratio.training.config import TokenRatioConfig

USAGE = """usage: tokenratio train RECIPE.yaml [--flag value ...]

Every setting can be a key of the recipe or a flag; flags take precedence. recipes/ has examples.
"""


def run_recipe(path: str, flags: dict[str, Any]) -> None:
    """Run a recipe, or with `dry_run` print what would be done."""
    read_recipe(path, flags)  # mistakes are reported before torch is imported
    from tokenratio.cli.terminal import is_terminal, quiet_libraries
    from tokenratio.cli.train import dry_run, train

    quiet_libraries()
    resolved = resolve(path, flags, {"disable_tqdm": not is_terminal()})
    if resolved.recipe.dry_run:
        print(dry_run(resolved))
    else:
        train(resolved)


@dataclass(frozen=True)
class Recipe:
    """The keys of a recipe that are not settings of its run: models, data, stages."""

    model: str | None = option(
        None, "Starting policy: a hub name, a folder, a GGUF file or package:smollm2."
    )
    model_config: dict[str, Any] | None = option(
        None, "A new starting policy from a transformers config: {model_type: llama, ...}."
    )
    tokenizer: str | dict[str, Any] | None = option(
        None,
        "The name of a model, world:NAME, or {byte_level_bpe: VOCABULARY SIZE} to train one on "
        "the data. Default: the model's.",
    )
    ref_model: str | None = option(None, "Reference model. Default: the starting policy.")
    train_dataset: str | list[Any] | dict[str, Any] | None = option(
        None,
        "A file, a folder, a hub name (NAME:CONFIG@SPLIT) or a world (world:NAME?...); {path: ..., "
        "split: ..., weight: ...}; or a list of these (docs/data.md).",
    )
    eval_dataset: str | list[Any] | dict[str, Any] | None = option(
        None, "Held-out pairs, in the same forms."
    )
    peft: dict[str, Any] | None = option(
        None,
        "Train a new adapter: the arguments of peft.LoraConfig, or with peft_type those of another "
        "kind. An adapter that the model already has is merged first.",
    )
    sft: dict[str, Any] | None = option(
        None, "Settings of a first stage, SFT on the chosen responses."
    )
    score_tokens: dict[str, Any] | None = option(
        None,
        "Compute the token scores that tis_dpo, sepo and t_reg need, before the run: {} for the "
        "published setup, or for each loss the settings that differ from it (docs/methods.md).",
    )
    dry_run: bool = option(
        False, "Print all settings, the data's summary and the memory needed, without training."
    )
    overwrite: bool = option(False, "Replace an existing run in output_dir.")

    def __post_init__(self) -> None:
        if (self.model is None) == (self.model_config is None):
            raise TokenRatioError("a recipe needs either model or model_config, and not both")
        if self.train_dataset is None:
            raise TokenRatioError("a recipe needs train_dataset")
        for name in _DATA:
            _check_sources(getattr(self, name), name)
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


# Models of a contrast that are trained for it: the starting policy after DPO on the pairs, and on
# the swapped pairs.
TRAINED = ("dpo", "reversed_dpo")
# What makes a policy of the run's kind; not what the run reports, saves, evaluates or uploads.
_CARRIED_TO_DPO = (
    *TEMPLATE_FLAGS,
    *("max_length", "max_prompt_length", "on_bad_row", "seed", "data_seed", "use_cpu"),
    *("train_split", "columns"),
    *("bf16", "fp16", "model_init_kwargs", "disable_tqdm"),
    *("activation_checkpointing", "gradient_checkpointing"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps"),
    *("optim", "weight_decay", "max_grad_norm", "train_sampling_strategy"),
    *("save_steps", "resume_with_changes"),
)
# What is held out of the run is held out of every stage before it.
_OF_ALL_STAGES = ("held_out_share", "selection_seed")
# Only what depends on the machine and the data: SFT is another kind of run.
_CARRIED_TO_SFT = (
    *("max_length", "max_prompt_length", "on_bad_row", "seed", "use_cpu", "bf16"),
    *("data_cache_dir", "dataset_num_proc", "resume_with_changes"),
    *(*_OF_ALL_STAGES, *TEMPLATE_FLAGS),
)
_DATA = ("train_dataset", "eval_dataset")
# The SFT stage may have its own data and adapter, and any setting of a run.
_SFT_KEYS = (*_DATA, "peft")


def recipe_fields() -> dict[str, Field]:
    """All keys of a recipe and flags of `train`: models, data and method come first."""
    config = _config_fields()
    of_method = {name: config[name] for name in fields_of(MethodSettings)}
    return fields_of(Recipe) | of_method | config


COMMAND = Command(
    USAGE, run_recipe, argument="one recipe", fields=recipe_fields, headings=TRAINING_HEADINGS
)


def _config_fields() -> dict[str, Field]:
    return declared_fields("tokenratio.training.config", "TokenRatioConfig")


@dataclass(frozen=True)
class Stage:
    """One training run: its settings, its data, and the settings of a new adapter, if any."""

    args: Any
    train_dataset: Any
    eval_dataset: Any
    peft: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.args.evaluated(self.train_dataset, self.eval_dataset)
        if self.args.eval_split is not None and self.eval_dataset is None:
            raise TokenRatioError(
                "eval_split names a split of eval_dataset: add eval_dataset, which may be the same "
                "source as train_dataset"
            )


@dataclass(frozen=True)
class Contrast:
    """What scores the tokens before the run: two models, or one model after two prompts.

    Attributes:
        positive, negative: `reference`, the starting policy; `dpo`, the starting policy after DPO
            on the run's pairs; `reversed_dpo`, after DPO on the swapped pairs; or a model's name or
            folder.
        positive_prompt, negative_prompt: templates that contain `{prompt}`.
        dpo: the stage that trains the DPO models.
    """

    positive: str
    negative: str
    positive_prompt: str
    negative_prompt: str
    dpo: Stage


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe with all defaults filled in: the optional stages and the run itself."""

    recipe: Recipe
    sft: Stage | None
    contrast: Contrast | None
    main: Stage


def read_recipe(path: str, flags: dict[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """A recipe and the given settings of its run, with the keys checked at any depth."""
    recipe, settings = read_values(path, flags, recipe_fields(), fields_of(Recipe))
    if recipe.sft is not None:
        check_known(recipe.sft, [*_config_fields(), *_SFT_KEYS], f"key in sft of {path}")
        for name in _DATA:
            _check_sources(recipe.sft.get(name), f"{name} in sft of {path}")
        if not isinstance(recipe.sft.get("peft") or {}, dict):
            raise TokenRatioError(f"peft in sft of {path} must hold `key: value` lines")
        if "resume_from_checkpoint" in recipe.sft:
            raise TokenRatioError(
                f"resume_from_checkpoint in sft of {path}: an interrupted stage goes on by "
                "itself; leave it out"
            )
        for name in _OF_ALL_STAGES:
            if name in recipe.sft:
                raise TokenRatioError(
                    f"{name} in sft of {path}: set it for the whole recipe, otherwise the first "
                    "stage would train on what the run is evaluated on"
                )
        _check_adapter(recipe.sft.get("peft"), f"peft in sft of {path}")
    _check_adapter(recipe.peft, f"peft of {path}")
    if recipe.score_tokens is not None:
        check_known(recipe.score_tokens, PUBLISHED_CONTRASTS, f"loss in score_tokens of {path}")
    return recipe, settings


def read_values(
    path: str, flags: dict[str, Any], known: Iterable[str], of_recipe: Iterable[str]
) -> tuple[Recipe, dict[str, Any]]:
    """A recipe and the given settings of its run, for a policy or a reward model.

    Args:
        flags: take precedence over the recipe.
        known: all keys that are allowed; `of_recipe`: those that are fields of `Recipe`.
    """
    values = read_yaml(path)
    check_known(values, known, f"key in {path}")
    values |= flags
    recipe = build(Recipe, {k: v for k, v in values.items() if k in of_recipe}, path)
    return recipe, {k: v for k, v in values.items() if k not in of_recipe}


def _check_adapter(settings: Any, where: str) -> None:
    """Convert LoRA's settings and refuse unknown ones; other kinds are checked when built."""
    if isinstance(settings, dict) and str(settings.get("peft_type", "LORA")).upper() == "LORA":
        known = declared_fields("peft.tuners.lora.config", "LoraConfig")
        check_known(settings, known, f"key in {where}", listed="see peft.LoraConfig")
        for name, value in settings.items():
            types = {known[name].hint, *get_args(known[name].hint)}
            if isinstance(value, str) and types & {int, float}:  # YAML reads 5e-2 as text
                settings[name] = convert(f"{name} in {where}", value, known[name])


def resolve(path: str, flags: dict[str, Any], defaults: dict[str, Any]) -> ResolvedRecipe:
    """Read a recipe and fill in its defaults: flags, the recipe, `defaults`, in this order."""
    recipe, settings = read_recipe(path, flags)
    loss = str(settings.get("loss", "tbpo_a"))
    base = Path("runs") / Path(path).stem
    # Each method has its own folder, so that a recipe can be run with several losses.
    settings = {"output_dir": str(base / loss), **defaults, **without_null_output(settings)}
    main = Stage(_config(settings, path), recipe.train_dataset, recipe.eval_dataset, recipe.peft)
    contrast = _contrast(recipe, main, settings, base, path)
    if recipe.sft is None:
        return ResolvedRecipe(recipe, None, contrast, main)
    if recipe.sft.get("loss", "sft") != "sft":
        raise TokenRatioError(f"the sft stage of {path} cannot have loss {recipe.sft['loss']!r}")
    own = {k: v for k, v in recipe.sft.items() if k not in _SFT_KEYS}
    carried = _CARRIED_TO_SFT
    if "train_dataset" not in recipe.sft:
        carried += ("train_split", "max_samples", "columns")
    settings = {
        "output_dir": str(base / "sft"),
        "optim": "adamw_torch",
        "learning_rate": 2e-5,
        "max_grad_norm": 1.0,
        "gradient_accumulation_steps": 1,
        **defaults,
        **{k: v for k, v in settings.items() if k in carried},
        **without_null_output(own),
        "loss": "sft",
    }
    config = _config(settings, f"sft of {path}")
    if "model_init_kwargs" not in own and main.args.model_init_kwargs:
        # The same model, in float32 unless an adapter on it is trained.
        config.model_init_kwargs = dict(main.args.model_init_kwargs)
        if not recipe.sft.get("peft"):
            config.model_init_kwargs.pop("dtype", None)
    data = recipe.sft.get("train_dataset", recipe.train_dataset)
    sft = Stage(config, data, recipe.sft.get("eval_dataset"), recipe.sft.get("peft"))
    return ResolvedRecipe(recipe, sft, contrast, main)


def _contrast(
    recipe: Recipe, main: Stage, settings: dict[str, Any], base: Path, path: str
) -> Contrast | None:
    """How the run's tokens are to be scored; None if they need not be, or already are."""
    from tokenratio.data.contrast import PLACE, check_prompt_template

    is_needed = main.args.method.needs_contrast and main.args.token_scores is None
    if recipe.score_tokens is None or not is_needed:
        return None
    section = recipe.score_tokens.get(main.args.loss) or {}
    where = f"score_tokens.{main.args.loss} of {path}"
    if not isinstance(section, dict) or not isinstance(section.get("dpo") or {}, dict):
        raise TokenRatioError(f"{where}, and dpo in it, must hold `key: value` lines")
    keys = ("positive", "negative", "positive_prompt", "negative_prompt")
    check_known(section, [*keys, "dpo"], f"key in {where}")
    published = PUBLISHED_CONTRASTS[main.args.loss]
    chosen = {"positive_prompt": PLACE, "negative_prompt": PLACE, **published}
    chosen |= {name: section[name] for name in keys if name in section}
    for name, value in chosen.items():
        if not isinstance(value, str) or not value:
            raise TokenRatioError(f"{name} in {where} must be text, not {value!r}")
        if name.endswith("_prompt"):
            check_prompt_template(value, f"{name} in {where}")
    if all(chosen[f"positive{part}"] == chosen[f"negative{part}"] for part in ("", "_prompt")):
        raise TokenRatioError(
            f"{where}: positive and negative are the same model with the same prompt"
        )
    own = section.get("dpo") or {}
    for name in ("loss", "output_dir", "resume_from_checkpoint", "token_scores"):
        if name in own:
            raise TokenRatioError(f"dpo in {where} cannot have {name}")
    shared = {k: v for k, v in settings.items() if k in _CARRIED_TO_DPO}
    # Checkpoints serve only to go on after an interruption.
    strategy = settings.get("save_strategy")
    shared["save_strategy"] = strategy if strategy in ("no", "epoch") else "steps"
    fixed = {"output_dir": str(base / "score_tokens"), "loss": "dpo", "save_total_limit": 1}
    config = _config({**shared, **own, **fixed}, where)
    return Contrast(**chosen, dpo=Stage(config, main.train_dataset, None, main.peft))


def _check_sources(source: Any, name: str) -> None:
    """Refuse anything but a name, a name with options, or a list of these."""
    for item in source if isinstance(source, list) else [source]:
        if isinstance(item, dict):
            known = declared_fields("tokenratio.data.sources", "DataSource")
            check_known(item, known, f"key in {name}")
            if not isinstance(item.get("path"), str):
                raise TokenRatioError(
                    f"a source in {name} needs path: a file, folder, hub name or world"
                )
        elif item is not None and not isinstance(item, str):
            raise TokenRatioError(
                f"{name} must be a name, {{path: ..., split: ..., weight: ...}} or a list of "
                f"these, not {item!r}"
            )


def without_null_output(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without `output_dir: null`, which means the default."""
    return {k: v for k, v in settings.items() if k != "output_dir" or v is not None}


def _config(settings: dict[str, Any], where: str) -> "TokenRatioConfig":
    from tokenratio.training.config import TokenRatioConfig

    return build(TokenRatioConfig, settings, where)
