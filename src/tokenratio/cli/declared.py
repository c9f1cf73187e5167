"""The settings that a dataclass declares, read from its source without importing it.

transformers' `TrainingArguments` and all that subclasses it take seconds to import. `--help` and a
misspelt flag need only names, types, defaults and help, which are literals in the source.
"""

import ast
import importlib.util
import typing
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from tokenratio.settings import Field, fields_of

# Where a package keeps what it exports from elsewhere.
_HOMES = {
    ("transformers", "TrainingArguments"): ("transformers.training_args", "TrainingArguments"),
    ("transformers.utils", "PushToHubMixin"): ("transformers.utils.hub", "PushToHubMixin"),
}
# Modules that are quick to import, so that their classes can be inspected directly.
_LIGHT = ("tokenratio.training.method_settings",)
_TYPES = {t.__name__: t for t in (bool, int, float, str, list, dict, tuple, set)}
_TYPES |= {"Any": Any, "ClassVar": typing.ClassVar, "Literal": typing.Literal}
_TYPES |= {"Optional": typing.Optional, "Union": typing.Union}


class _NotLiteralError(ValueError):
    """A declaration holds an expression that only Python can evaluate."""


def declared_fields(module: str, name: str) -> dict[str, Field]:
    """The same as `fields_of` a class, without importing its module if its source allows it.

    A type that the source imports counts as text: transformers' enumerations are given by name.
    """
    try:
        return dict(_declared(module, name))
    except (_NotLiteralError, OSError, SyntaxError, LookupError):
        return fields_of(getattr(import_module(module), name))


@cache
def _declared(module: str, name: str) -> dict[str, Field]:
    if module in _LIGHT:
        return fields_of(getattr(import_module(module), name))
    tree = ast.parse(_source(module).read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    definition = classes[name]
    fields: dict[str, Field] = {}
    # As dataclasses do it: of two bases the first wins, and a field stays where it stood first.
    for base in reversed(definition.bases):
        fields |= _declared(*_home(tree, base, module))
    constants = _constants(definition)
    for statement in definition.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            field = _field(statement, constants)
            if field is not None:
                fields[statement.target.id] = field
    return fields


def _source(module: str) -> Path:
    """The file of a module; of its package no more than the place is looked up."""
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise LookupError(package)
    return Path(spec.submodule_search_locations[0]).joinpath(*rest).with_suffix(".py")


def _home(tree: ast.Module, base: ast.expr, module: str) -> tuple[str, str]:
    """The module that a base class is defined in, and its name there."""
    if not isinstance(base, ast.Name):
        raise _NotLiteralError
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom) and statement.module:
            above = module.split(".")[: -statement.level] if statement.level else []
            for alias in statement.names:
                if (alias.asname or alias.name) == base.id:
                    home = (".".join([*above, statement.module]), alias.name)
                    return _HOMES.get(home, home)
    return module, base.id


def _constants(definition: ast.ClassDef) -> dict[str, ast.expr]:
    """Names that a class gives to values. Under a condition, the last one: newer torch has it."""
    return {
        statement.targets[0].id: statement.value
        for statement in ast.walk(definition)
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }


def _field(statement: ast.AnnAssign, constants: Mapping[str, ast.expr]) -> Field | None:
    """One declaration; None if it is not an argument of the class."""
    hint = _hint(statement.annotation)
    value = statement.value
    if typing.get_origin(hint) is typing.ClassVar:
        return None
    if not isinstance(value, ast.Call):
        return Field(hint, "" if value is None else str(_literal(value)), "")
    given = {keyword.arg: keyword.value for keyword in value.keywords}
    if isinstance(value.func, ast.Name) and value.func.id == "option":
        given |= dict(zip(("default", "help"), value.args, strict=False))
    elif not isinstance(value.func, ast.Name) or value.func.id != "field" or value.args:
        raise _NotLiteralError
    if "init" in given and not _literal(given["init"]):
        return None
    default = ""
    if "default" in given:
        value = given["default"]
        default = str(
            _literal(constants.get(value.id, value) if isinstance(value, ast.Name) else value)
        )
    help_text = " ".join(str(_literal(given["help"])).split()) if "help" in given else ""
    metadata = given.get("metadata")
    if metadata is not None:
        if not isinstance(metadata, ast.Dict):
            raise _NotLiteralError
        for key, each in zip(metadata.keys, metadata.values, strict=True):
            if key is not None and _literal(key) == "help":
                help_text = " ".join(str(_literal(each)).split())
    return Field(hint, default, help_text)


def _literal(value: ast.expr) -> Any:
    try:
        return ast.literal_eval(value)
    except ValueError:
        raise _NotLiteralError from None


def _hint(annotation: ast.expr) -> Any:
    """The type that an annotation names; importing its module would evaluate the same text."""
    code = compile(ast.Expression(annotation), "annotation", "eval")
    try:
        hint = eval(code, {"__builtins__": {}}, _Types())
    except (TypeError, AttributeError) as error:
        raise _NotLiteralError from error
    return str if isinstance(hint, str) else hint


class _Types(dict[str, Any]):
    """Types by name; what is not among them counts as text."""

    def __missing__(self, name: str) -> Any:
        return _TYPES.get(name, str)
