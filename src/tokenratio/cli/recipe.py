"""`tokenratio train RECIPE.yaml`: reading a recipe; `train` and `dry_run` carry it out.

A recipe is a YAML file whose keys are the fields of `Recipe` and of `TokenRatioConfig`. They are
checked before torch is imported, so that a misspelt one is reported at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tokenratio.cli.command import Command, read_yaml
from tokenratio.cli.declared import declared_fields
from tokenratio.cli.training_headings import TRAINING_HEADINGS
from tokenratio.errors import TokenRatioError
from tokenratio.settings import Field, build, check_known, convert, fields_of, option
from tokenratio.training.method_settings import PUBLISHED_CONTRASTS, MethodSettings

if TYPE_CHECKING:
    from tokenratio.training.config import TokenRatioConfig

USAGE = """usage: tokenratio train RECIPE.yaml [--field value ...]

A recipe's keys and the flags are the same; flags win. See recipes/ for examples.
"""


def run_recipe(path: str, flags: dict[str, Any]) -> None:
    """Train what a recipe describes, or print what would be done."""
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
    """The keys of a recipe besides the settings of the run: models, data, stages.

    Raises:
        TokenRatioError: neither or both of `model` and `model_config`, or no data.
    """

    model: str | None = option(None, "Starting policy: a hub name or a folder.")
    model_config: dict[str, Any] | None = option(
        None, "Starting policy from a transformers config: {model_type: llama, ...}."
    )
    tokenizer: str | dict[str, Any] | None = option(
        None,
        "A hub name or folder, world:NAME, or {byte_level_bpe: VOCABULARY SIZE}, "
        "trained from the data. Default: the model's.",
    )
    ref_model: str | None = option(None, "Reference; default: the starting policy.")
    train_dataset: str | list[Any] | dict[str, Any] | None = option(
        None,
        "A file, a folder, a hub name (NAME:CONFIG@SPLIT) or a world; {path: ..., "
        "split: ..., weight: ...}; or a list of these.",
    )
    eval_dataset: str | list[Any] | dict[str, Any] | None = option(
        None, "Held-out pairs, likewise."
    )
    peft: dict[str, Any] | None = option(
        None,
        "A new adapter: the arguments of peft.LoraConfig, or with peft_type those of "
        "another kind. One that the model has already is merged first.",
    )
    sft: dict[str, Any] | None = option(
        None, "A first stage of SFT on the chosen responses: its own settings."
    )
    score_tokens: dict[str, Any] | None = option(
        None,
        "Compute the contrast that tis_dpo, sepo and t_reg need, before the run: for "
        "each loss what differs from its published way (`tokenratio score-tokens --help`).",
    )
    dry_run: bool = option(False, "Resolve everything, print it and stop.")
    overwrite: bool = option(False, "Replace the run that output_dir holds.")

    def __post_init__(self) -> None:
        if (self.model is None) == (self.model_config is None):
            raise TokenRatioError("a recipe needs either model or model_config, and not both")
        if self.train_dataset is None:
            raise TokenRatioError("a recipe needs train_dataset")
        for name in ("train_dataset", "eval_dataset"):
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


# What a contrast can name beside models: the starting policy after DPO on the pairs, and on the
# pairs swapped.
TRAINED = ("dpo", "reversed_dpo")
_CARRIED_TO_DPO = (
    *("max_length", "max_prompt_length", "on_bad_row", "seed", "data_seed", "use_cpu"),
    *("train_split", "columns"),
    *("bf16", "fp16", "model_init_kwargs", "gradient_checkpointing", "disable_tqdm"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps"),
    *("optim", "weight_decay", "max_grad_norm", "train_sampling_strategy"),
)
# A stage of its own may have its own data and adapter, and any setting of a run.
_SFT_DATA = ("train_dataset", "eval_dataset")
_SFT_KEYS = (*_SFT_DATA, "peft")
# What is held out of the run is held out of every stage before it.
_OF_ALL_STAGES = ("held_out_share", "selection_seed")
# A stage before the run renders conversations as the run does, unless it has its own settings.
_TEMPLATE = ("chat_template", "chat_template_kwargs", "tools", "template_date")


def recipe_fields() -> dict[str, Field]:
    """Every key a recipe or a flag of `train` may name: models, data and method come first."""
    config = _config_fields()
    of_method = {name: config[name] for name in fields_of(MethodSettings)}
    return fields_of(Recipe) | of_method | config


COMMAND = Command(
    USAGE,
    run_recipe,
    argument="one recipe",
    fields=recipe_fields,
    headings=TRAINING_HEADINGS,
)


def _config_fields() -> dict[str, Field]:
    return declared_fields("tokenratio.training.config", "TokenRatioConfig")


@dataclass(frozen=True)
class Stage:
    """One training run: its settings, its data, and its adapter if it trains a new one."""

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
    """What tells tokens apart before the run: two models, or one after two prompts.

    Attributes:
        positive: `reference`, the starting policy; `dpo`, the same after DPO on the run's pairs;
            `reversed_dpo`, on the pairs swapped; or a model's name or folder. `negative` likewise.
        positive_prompt: what stands around its prompts, `{prompt}` for the prompt itself;
            `negative_prompt` likewise.
        dpo: the stage of the models to be trained for it.
    """

    positive: str
    negative: str
    positive_prompt: str
    negative_prompt: str
    dpo: Stage


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe with every default filled in: optional stages before it, then the run itself."""

    recipe: Recipe
    sft: Stage | None
    contrast: Contrast | None
    main: Stage


def read_recipe(path: str, flags: dict[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """A recipe, and the settings of its run as they are given; flags win.

    Raises:
        TokenRatioError: an unknown key, at any depth; a value of `Recipe` that does not fit.
    """
    recipe, settings = read_values(path, flags, recipe_fields(), fields_of(Recipe))
    if recipe.sft is not None:
        check_known(recipe.sft, [*_config_fields(), *_SFT_KEYS], f"key in sft of {path}")
        for name in _SFT_DATA:
            _check_sources(recipe.sft.get(name), f"{name} in sft of {path}")
        if not isinstance(recipe.sft.get("peft") or {}, dict):
            raise TokenRatioError(f"peft in sft of {path} must hold `key: value` lines")
        for name in _OF_ALL_STAGES:
            if name in recipe.sft:
                raise TokenRatioError(
                    f"{name} in sft of {path}: set it for the whole recipe, or the first stage "
                    "would learn what the run is evaluated on"
                )
        _check_adapter(recipe.sft.get("peft"), f"peft in sft of {path}")
    _check_adapter(recipe.peft, f"peft of {path}")
    if recipe.score_tokens is not None:
        check_known(recipe.score_tokens, PUBLISHED_CONTRASTS, f"loss in score_tokens of {path}")
    return recipe, settings


def read_values(
    path: str, flags: dict[str, Any], known: Iterable[str], of_recipe: Iterable[str]
) -> tuple[Recipe, dict[str, Any]]:
    """A recipe and the settings of its run, whatever is trained; flags win.

    Args:
        known: every key there may be; `of_recipe` those of `Recipe`.
    Raises:
        TokenRatioError: an unknown key, naming the nearest right one; a value that does not fit.
    """
    values = read_yaml(path)
    check_known(values, known, f"key in {path}")
    values |= flags
    recipe = build(Recipe, {k: v for k, v in values.items() if k in of_recipe}, path)
    return recipe, {k: v for k, v in values.items() if k not in of_recipe}


def _check_adapter(settings: Any, where: str) -> None:
    """Give LoRA's settings their types and refuse others; other kinds are checked when built."""
    if isinstance(settings, dict) and str(settings.get("peft_type", "LORA")).upper() == "LORA":
        known = declared_fields("peft.tuners.lora.config", "LoraConfig")
        check_known(settings, known, f"key in {where}", listed="see peft.LoraConfig")
        for name, value in settings.items():
            types = {known[name].hint, *get_args(known[name].hint)}
            if isinstance(value, str) and types & {int, float}:  # YAML reads 5e-2 as text
                settings[name] = convert(f"{name} in {where}", value, known[name])


def resolve(path: str, flags: dict[str, Any], defaults: dict[str, Any]) -> ResolvedRecipe:
    """Read a recipe; flags win over it, it wins over `defaults`.

    Raises:
        TokenRatioError: an unknown key, naming the nearest right one; a value that does not fit.
    """
    recipe, settings = read_recipe(path, flags)
    loss = str(settings.get("loss", "tbpo_a"))
    base = Path("runs") / Path(path).stem
    # Each method has its own folder, so that one recipe run with two losses overwrites nothing.
    settings = {"output_dir": str(base / loss), **defaults, **without_null_output(settings)}
    main = Stage(_config(settings, path), recipe.train_dataset, recipe.eval_dataset, recipe.peft)
    contrast = _contrast(recipe, main, settings, base, path)
    if recipe.sft is None:
        return ResolvedRecipe(recipe, None, contrast, main)
    if recipe.sft.get("loss", "sft") != "sft":
        raise TokenRatioError(f"the sft stage of {path} cannot have loss {recipe.sft['loss']!r}")
    own = {k: v for k, v in recipe.sft.items() if k not in _SFT_KEYS}
    # Only what belongs to the machine and the data carries over; the rest is another kind of run.
    carried = ("max_length", "max_prompt_length", "on_bad_row", "seed", "use_cpu", "bf16")
    carried += (*_OF_ALL_STAGES, *_TEMPLATE)
    carried += ("data_cache_dir", "dataset_num_proc")
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
    data = recipe.sft.get("train_dataset", recipe.train_dataset)
    config = _config(settings, f"sft of {path}")
    if "model_init_kwargs" not in own and main.args.model_init_kwargs:
        # The same model, in float32 unless an adapter on it is trained.
        left_out = () if recipe.sft.get("peft") else ("dtype",)
        given = main.args.model_init_kwargs.items()
        config.model_init_kwargs = {k: v for k, v in given if k not in left_out}
    sft = Stage(config, data, recipe.sft.get("eval_dataset"), recipe.sft.get("peft"))
    return ResolvedRecipe(recipe, sft, contrast, main)


def _contrast(
    recipe: Recipe, main: Stage, settings: dict[str, Any], base: Path, path: str
) -> Contrast | None:
    """How the run's tokens are to be scored; None where they need not be, or are already."""
    from tokenratio.data.contrast import PLACE, check_prompt_template

    sections = recipe.score_tokens
    needs_none = not main.args.method.needs_contrast or main.args.token_scores is not None
    if sections is None or needs_none:
        return None
    section = sections.get(main.args.loss) or {}
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
    if len({chosen["positive"], chosen["negative"]}) == 1 and (
        chosen["positive_prompt"] == chosen["negative_prompt"]
    ):
        raise TokenRatioError(
            f"{where}: positive and negative are the same model after the same prompt"
        )
    own = section.get("dpo") or {}
    for name in ("loss", "output_dir", "resume_from_checkpoint", "token_scores"):
        if name in own:
            raise TokenRatioError(f"dpo in {where} cannot have {name}")
    # What makes a policy of the run's kind; not what the run reports, saves, evaluates or uploads.
    shared = {k: v for k, v in settings.items() if k in (*_CARRIED_TO_DPO, *_TEMPLATE)}
    fixed = {"output_dir": str(base / "score_tokens"), "loss": "dpo", "save_strategy": "no"}
    config = _config({**shared, **own, **fixed}, where)
    stage = Stage(config, main.train_dataset, None, main.peft)
    return Contrast(**chosen, dpo=stage)


def _check_sources(source: Any, name: str) -> None:
    """Refuse what is neither a name, nor a name with options, nor a list of these."""
    for item in source if isinstance(source, list) else [source]:
        if isinstance(item, dict):
            known = declared_fields("tokenratio.data.sources", "DataSource")
            check_known(item, known, f"key in {name}")
            if not isinstance(item.get("path"), str):
                raise TokenRatioError(f"a source in {name} needs path, a text")
        elif item is not None and not isinstance(item, str):
            raise TokenRatioError(
                f"{name} must be a name, {{path: ..., split: ..., weight: ...}} or a list of "
                f"these, not {item!r}"
            )


def without_null_output(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without `output_dir: null`, which stands for the default."""
    return {k: v for k, v in settings.items() if k != "output_dir" or v is not None}


def _config(settings: dict[str, Any], where: str) -> "TokenRatioConfig":
    from tokenratio.training.config import TokenRatioConfig

    return build(TokenRatioConfig, settings, where)
