"""YAML as people write settings in it: loaded safely, in bounded time, each fault with its line."""

from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from tokenratio.errors import TokenRatioError
from tokenratio.text_files import decode_utf8

# Far more than any recipe has. Aliases count as what they stand for.
MAX_BYTES, MAX_NODES, MAX_DEPTH = 1 << 18, 20_000, 100
_MERGE = "tag:yaml.org,2002:merge"
_KINDS = {"bool": "true or false", "int": "a whole number", "float": "a number"}
_KINDS |= {"timestamp": "a date", "binary": "base64"}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises `TokenRatioError` for any other file, naming the line."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise TokenRatioError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:  # a NUL in the name
        raise TokenRatioError(f"cannot read {path!r}: not the name of a file") from None
    if len(data) > MAX_BYTES:
        raise TokenRatioError(
            f"{path} is larger than {MAX_BYTES // 1024} KiB: not settings in YAML"
        )
    values = parse_yaml(decode_utf8(data, str(path)), str(path))
    if values is None:
        raise TokenRatioError(f"{path} is empty: it must hold `key: value` lines")
    if not isinstance(values, dict):
        raise TokenRatioError(f"{path} must hold `key: value` lines")
    return values


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text.

    Merge keys (`<<: *defaults`) are supported. Unlike YAML, a key that is given twice is refused.

    Raises:
        TokenRatioError: it is not YAML, asks for an object of a program, refers to itself, grows
            beyond `MAX_NODES` by its aliases, or holds a value that cannot be read; names the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        code = error.character if isinstance(error.character, int) else ord(error.character)
        fault = f"the character U+{code:04X} cannot be in YAML"
        raise TokenRatioError(f"{where}:{line}: {fault}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        fault = ", ".join(filter(None, (error.context, error.problem)))
        line = 1 if mark is None else mark.line + 1
        raise TokenRatioError(f"{where}:{line}: not YAML: {' '.join(fault.split())}") from None


class _Loader(yaml.SafeLoader):
    """Safe loading with limits; every fault has a mark."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        # Of each finished node, by its id: how many nodes it has, aliases counted as their targets.
        self._sizes: dict[int, int] = {}
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            node: Any = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                fault = f"the alias *{event.anchor} contains itself"
                raise ComposerError(None, None, fault, event.start_mark)
            return node
        self._depth += 1
        if self._depth > MAX_DEPTH:
            fault = f"nested more than {MAX_DEPTH} levels deep"
            raise ComposerError(None, None, fault, event.start_mark)
        node = super().compose_node(parent, index)
        children = []
        if isinstance(node, yaml.MappingNode):
            children = [each for pair in node.value for each in pair]
            self._check_keys(node)
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        self._depth -= 1
        self._sizes[id(node)] = size = 1 + sum(self._sizes[id(each)] for each in children)
        if size > MAX_NODES:
            fault = f"more than {MAX_NODES:,} values, aliases counted as what they stand for"
            raise ComposerError(None, None, fault, event.start_mark)
        return node

    def _check_keys(self, node: Any) -> None:
        """Refuse a repeated key, where YAML would keep the last; before merged keys are added."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            fault = ""
            if not isinstance(key_node, yaml.ScalarNode):
                raise ComposerError(None, None, "a key must be a text", key_node.start_mark)
            key = self.construct_object(key_node)
            if self._depth == 1 and not isinstance(key, str):
                fault = f"the key {key_node.value!r} is read as {key!r}: put it in quotes"
            elif key in seen:
                fault = f"the key {key!r} is given twice"
            if fault:
                raise ComposerError(None, None, fault, key_node.start_mark)
            seen.add(key)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError):
            kind = node.tag.rpartition(":")[2]
            text = repr(node.value)[:60] if isinstance(node, yaml.ScalarNode) else "this"
            fault = f"{text} is not {_KINDS.get(kind, kind)}"
            raise ConstructorError(None, None, fault, node.start_mark) from None
        fault = ""
        if isinstance(value, int) and abs(value) >= 2**64:
            fault = "a whole number of more than 64 bits"
        elif isinstance(value, str) and not _is_text(value):
            fault = "a text with a NUL or with half of a surrogate pair"
        if fault:
            raise ConstructorError(None, None, fault, node.start_mark)
        return value


def _is_text(value: str) -> bool:
    return "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)
