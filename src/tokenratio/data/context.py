"""The other parts of a row: system prompt, tools, template options, a verdict."""

from collections.abc import Mapping
from typing import Any

from tokenratio.data.defects import DefectKind, RowDefectError
from tokenratio.data.layouts import SYSTEM_COLUMNS
from tokenratio.data.messages import kind_of, structured

_GOOD = frozenset(
    {True, "true", "1", "1.0", "good", "desirable", "chosen", "accepted", "thumbs_up", "yes"}
)
_BAD = frozenset(
    {
        *(False, -1, "false", "0", "0.0", "-1", "-1.0"),
        *("bad", "undesirable", "rejected", "thumbs_down", "no"),
    }
)


def verdict(value: object) -> bool | None:
    """The meaning of a completion's label: good (True), bad (False) or unknown (None).

    >>> verdict(True), verdict("False"), verdict("undesirable"), verdict("sports")
    (True, False, False, None)
    """
    key = value.strip().lower() if isinstance(value, str) else value
    if not isinstance(key, str | int | float):
        return None
    return True if key in _GOOD else False if key in _BAD else None


def system_of(fields: Mapping[str, Any]) -> str | None:
    """The system prompt of a row; None where it has none, or an empty one."""
    name = next((name for name in SYSTEM_COLUMNS if name in fields), None)
    value = None if name is None else fields[name]
    if value is None or isinstance(value, str):
        return value if value and value.strip() else None
    raise RowDefectError(DefectKind.NON_STRING_FIELD, f"{name} is {kind_of(value)}, not a string")


def template_kwargs_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What the row asks of the chat template; empty where it asks nothing."""
    options = structured(fields.get("chat_template_kwargs")) or {}
    if not isinstance(options, dict):
        raise RowDefectError(
            DefectKind.MALFORMED_ROW,
            f"chat_template_kwargs is {kind_of(options)}, not an object",
        )
    # Arrow gives every row the keys of all rows, with null where a row had none.
    return {name: value for name, value in options.items() if value is not None}


def tools_of(fields: Mapping[str, Any]) -> list[Any] | None:
    """The schemas of the row's tools; None where it has none."""
    tools = fields.get("tools")
    if isinstance(tools, str) and tools.strip():
        found = structured(tools)  # often text, since Arrow wants one type per column
        if found is tools:
            raise RowDefectError(DefectKind.MALFORMED_ROW, "tools is a string that is not JSON")
        tools = found
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return None
    if not isinstance(tools, list):
        raise RowDefectError(
            DefectKind.MALFORMED_ROW, f"tools is {kind_of(tools)}, not a list of schemas"
        )
    return tools
