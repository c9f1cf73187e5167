"""The public surface: names, signatures, settings, metrics, flags and keys of files, pinned.

What changes here changes for users. `python tests/test_public_surface.py` writes the surface as it
is now to public_surface.json; the difference belongs into the change that made it, and a line of it
into CHANGELOG.md.
"""

import dataclasses
import inspect
import json
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).with_name("public_surface.json")


def surface() -> dict[str, Any]:
    """All of it, as JSON values."""
    return {
        "names": names(),
        "settings": settings(),
        "methods": methods(),
        "metrics": metrics(),
        "commands": commands(),
        "files": files(),
    }


def names() -> dict[str, str]:
    """Every public name with its signature."""
    import tokenratio

    return {name: describe(getattr(tokenratio, name)) for name in dir(tokenratio)}


def describe(value: Any) -> str:
    """A callable's parameters and their defaults, an exception's base, or the type of a value."""
    if inspect.isclass(value) and issubclass(value, Exception):
        return value.__mro__[1].__name__
    if dataclasses.is_dataclass(value):
        return "settings" if value.__name__ in ALL_SETTINGS else "dataclass"
    if not callable(value):
        return type(value).__name__
    parameters = [
        p.replace(annotation=inspect.Parameter.empty)
        for p in inspect.signature(value).parameters.values()
    ]
    return str(inspect.Signature(parameters))


ALL_SETTINGS = ("TokenRatioConfig", "RewardConfig", "EvaluateOptions", "InspectOptions")


def settings() -> dict[str, dict[str, str]]:
    """The library's own settings and their defaults; of transformers' those that differ."""
    from transformers import TrainingArguments

    import tokenratio
    from tokenratio.evaluation.judges.registry import JUDGES

    inherited = defaults(TrainingArguments)
    found = {}
    for name in ALL_SETTINGS:
        own = defaults(getattr(tokenratio, name))
        found[name] = {k: v for k, v in own.items() if inherited.get(k) != v}
    for name, kind in JUDGES.items():
        found[f"judge {name}"] = defaults(kind)
    return found


def defaults(cls: type) -> dict[str, str]:
    """The fields of a dataclass and their defaults as text."""
    values = {}
    for field in dataclasses.fields(cls):
        if field.init:
            factory = field.default_factory
            made = field.default if factory is dataclasses.MISSING else factory()
            values[field.name] = "required" if made is dataclasses.MISSING else repr(made)
    return values


def methods() -> dict[str, Any]:
    """What `loss` and `generator` can name, and each method's own settings."""
    from tokenratio.bregman import GENERATORS
    from tokenratio.losses import METHODS

    found = {
        name: {key: str(value) for key, value in method.settings.items()}
        for name, method in METHODS.items()
    }
    return {"loss": found, "generator": sorted(GENERATORS)}


def metrics() -> dict[str, list[str]]:
    """The metrics that evaluation of a run reports, without `eval_`."""
    from tokenratio import TokenRatioConfig
    from tokenratio.losses import METHODS

    def of(loss: str) -> list[str]:
        config = TokenRatioConfig(output_dir="unused", loss=loss, use_cpu=True, report_to="none")
        return sorted(config.evaluated_metrics())

    return {loss: of(loss) for loss in METHODS}


def commands() -> dict[str, list[str]]:
    """The flags of every command; of `train` and `train-reward` without transformers' own."""
    from transformers import TrainingArguments

    from tokenratio.cli.main import COMMANDS
    from tokenratio.settings import fields_of

    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    found = {}
    for name, (module, _) in COMMANDS.items():
        command = import_module(module).COMMAND
        fields = command.fields() if command.options is None else fields_of(command.options)
        found[name] = sorted(set(fields) - inherited)
    return found


def files() -> dict[str, Any]:
    """The files of a run and of its evaluation, and the keys of each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_and_evaluate(folder)
        return {
            path.relative_to(folder).as_posix(): keys(path)
            for path in sorted(folder.rglob("*"))
            if path.name in (*OURS, *OTHERS)
        }


def train_and_evaluate(folder: Path) -> None:
    """One step of TBPO-Q on the review world, and an evaluation with the world's judge."""
    import torch
    from transformers import AutoModelForCausalLM

    from tokenratio import EvaluateOptions, TokenRatioConfig, TokenRatioTrainer, evaluate
    from tokenratio.data.worlds import WORLDS

    world = WORLDS["reviews"]
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = world.policy_config(**sizes, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    tokenizer = world.build_tokenizer()
    for part in (model, tokenizer):
        part.save_pretrained(folder / "start")
    trainer = TokenRatioTrainer(
        str(folder / "start"),
        args=TokenRatioConfig(
            output_dir=str(folder / "run"),
            loss="tbpo_q",
            max_steps=1,
            max_length=64,
            save_steps=1,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            data_cache_dir=str(folder / ".cache"),
        ),
        train_dataset="world:reviews?pairs=32",
        eval_dataset="world:reviews?pairs=4&split=test",
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    options = EvaluateOptions(
        output_dir=str(folder / "evaluation"),
        prompts="world:reviews?prompts=2&split=test",
        pairs="world:reviews?pairs=4&split=test",
        num_samples=2,
        max_new_tokens=8,
    )
    evaluate([f"policy={folder / 'run'}"], options, report=lambda line: None)


def keys(path: Path) -> Any:
    """The keys of the objects in a JSON or JSON-lines file; None for other files."""
    if path.name in OTHERS:
        return None
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    found: dict[str, Any] = {}
    for line in lines:
        for key, value in json.loads(line).items():
            first = value[0] if isinstance(value, list) and value else value
            nested = isinstance(first, dict) and key not in ("config", "contents", "settings")
            found[key] = sorted(first) if nested else None
    return found


OURS = ("run.json", "metrics.jsonl", "generations.jsonl", "judgements-gold.jsonl", "measures.json")
OTHERS = ("README.md", "state_baseline.safetensors", "generations.settings.json", "table.md")


def test_a_star_import_gives_the_public_names():
    import tokenratio

    given: dict[str, Any] = {}
    exec("from tokenratio import *", given)
    assert sorted(given.keys() - {"__builtins__"}) == dir(tokenratio)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["names", "settings", "methods", "metrics", "commands", "files"])
def test_the_public_surface_is_as_pinned(part):
    pinned = json.loads(FILE.read_text(encoding="utf-8"))[part]
    now = json.loads(json.dumps(globals()[part]()))
    assert now == pinned, "if this is meant: python tests/test_public_surface.py, and CHANGELOG.md"


if __name__ == "__main__":
    FILE.write_text(json.dumps(surface(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    sys.stdout.write(f"{FILE}\n")
