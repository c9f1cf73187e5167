"""The settings that a dataclass declares, read from its source without importing it.

transformers' `TrainingArguments` and its subclasses take seconds to import. `--help` and the check
for misspelt flags need only names, types, defaults and help, which the source spells out.
"""

import ast
import contextlib
import importlib.util
import typing
from collections import defaultdict
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from tokenratio.settings import Field, fields_of

# Where classes that are exported from another module are defined.
_HOMES = {
    ("transformers", "TrainingArguments"): ("transformers.training_args", "TrainingArguments"),
    ("transformers.utils", "PushToHubMixin"): ("transformers.utils.hub", "PushToHubMixin"),
}
# Modules that are quick to import.
_LIGHT = ("tokenratio.training.method_settings",)
_TYPES = {t.__name__: t for t in (bool, int, float, str, list, dict, tuple, set)}
_TYPES |= {"Any": Any, "ClassVar": typing.ClassVar, "Literal": typing.Literal}
_TYPES |= {"Optional": typing.Optional, "Union": typing.Union}
# What a default may refer to: a declaration evaluates to its arguments.
_NAMES = {
    **_TYPES,
    "field": dict,
    "option": lambda default, help, **_: {"default": default, "metadata": {"help": help}},
}


def declared_fields(module: str, name: str) -> dict[str, Field]:
    """`fields_of` a class, without importing its module if its source can be evaluated.

    A type that the source imports counts as text: transformers' enumerations are given by name.
    """
    try:
        return dict(_declared(module, name))
    except (OSError, SyntaxError, LookupError, NameError, TypeError, AttributeError, ValueError):
        return fields_of(getattr(import_module(module), name))


@cache
def _declared(module: str, name: str) -> dict[str, Field]:
    if module in _LIGHT:
        return fields_of(getattr(import_module(module), name))
    tree = ast.parse(_source(module).read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    definition = classes[name]
    fields: dict[str, Field] = {}
    # As in dataclasses, the first of two bases wins, and a redefined field keeps its place.
    for base in reversed(definition.bases):
        fields |= _declared(*_home(tree, base, module))
    names = defaultdict(_Unknown, _NAMES | _constants(definition))
    for statement in definition.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            field = _field(statement, names)
            if field is not None:
                fields[statement.target.id] = field
    return fields


def _source(module: str) -> Path:
    """The file of a module, found without importing its package."""
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise LookupError(package)
    return Path(spec.submodule_search_locations[0]).joinpath(*rest).with_suffix(".py")


def _home(tree: ast.Module, base: ast.expr, module: str) -> tuple[str, str]:
    """The module that a base class is defined in, and its name there."""
    if not isinstance(base, ast.Name):
        raise LookupError(ast.unparse(base))
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom) and statement.module:
            above = module.split(".")[: -statement.level] if statement.level else []
            for alias in statement.names:
                if (alias.asname or alias.name) == base.id:
                    home = (".".join([*above, statement.module]), alias.name)
                    return _HOMES.get(home, home)
    return module, base.id


def _constants(definition: ast.ClassDef) -> dict[str, Any]:
    """Names that a class gives to literals; of two under a condition, the last (for new torch)."""
    found = {}
    for statement in ast.walk(definition):
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            with contextlib.suppress(ValueError):
                found[statement.targets[0].id] = ast.literal_eval(statement.value)
    return found


def _field(statement: ast.AnnAssign, names: dict[str, Any]) -> Field | None:
    """One declaration; None if it is not an argument of the class."""
    hint = _evaluated(statement.annotation, defaultdict(lambda: str, _TYPES))
    if typing.get_origin(hint) is typing.ClassVar:
        return None
    hint = str if isinstance(hint, str) else hint
    value = "" if statement.value is None else _evaluated(statement.value, names)
    if not isinstance(value, dict):
        return Field(hint, str(value), "")
    if not value.get("init", True):
        return None
    help_text = value.get("metadata", {}).get("help", "")
    return Field(hint, str(value.get("default", "")), " ".join(help_text.split()))


def _evaluated(expression: ast.expr, names: dict[str, Any]) -> Any:
    """The value of an expression, as importing its module would evaluate it."""
    return eval(compile(ast.Expression(expression), "source", "eval"), {"__builtins__": {}}, names)


class _Unknown:
    """What only importing the module would define; fails where its value is needed."""

    def __getattr__(self, name: str) -> "_Unknown":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> "_Unknown":
        return self

    def __repr__(self) -> str:
        raise NameError
