"""What can be wrong with a row of data, and the log that counts skipped rows."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, get_args

from tokenratio.data.display import printable
from tokenratio.errors import TokenRatioError

OnBadRow = Literal["error", "skip"]


class DefectKind(StrEnum):
    """Why a row cannot be trained on. A row counts once, under the first reason found."""

    MALFORMED_ROW = "malformed row"
    MISSING_COLUMN = "missing column"
    AMBIGUOUS_PROMPT = "ambiguous prompt"
    NO_PREFERENCE = "no preference"
    LABELLED_BAD = "labelled bad"
    NON_STRING_FIELD = "non-string field"
    MIXED_FORMAT = "mixed format"
    BAD_CONVERSATION = "bad conversation"
    UNENCODABLE_TEXT = "unencodable text"
    BLANK_RESPONSE = "blank response"
    IDENTICAL_PAIR = "identical pair"
    TEMPLATE_FAILURE = "template failure"
    PROMPT_FILLS_MAX_LENGTH = "prompt fills max_length"
    IDENTICAL_TOKENS = "identical tokens"
    IDENTICAL_AFTER_TRUNCATION = "identical after truncation"


class WarningKind(StrEnum):
    """What is unusual about a row that is kept. A row may count under several kinds."""

    DUPLICATE_ROW = "duplicate row"
    CONTRADICTORY_PAIR = "contradictory pair"
    PROMPT_REPEATED = "prompt repeated"
    MESSAGES_AS_TEXT = "messages as text"
    SAME_ROLE_TURNS = "consecutive same-role turns"
    REPLACEMENT_CHARACTER = "replacement character U+FFFD"
    CARRIAGE_RETURN = "carriage return"
    CONTROL_CHARACTER = "control character"
    EOS_INSIDE_RESPONSE = "EOS inside a response"
    TEMPLATE_OMISSION = "text left out by the template"


@dataclass(frozen=True)
class Defect:
    """One finding: where (`train.jsonl:17`), of which kind, and what exactly."""

    origin: str
    kind: DefectKind | WarningKind
    detail: str


class RowDefectError(Exception):
    """A row that cannot be used. Internal: `DefectLog` records it as a `Defect`."""

    def __init__(self, kind: DefectKind, detail: str):
        super().__init__(detail)
        self.kind = kind
        self.detail = detail

    def __reduce__(self) -> tuple[type["RowDefectError"], tuple[DefectKind, str]]:
        return type(self), (self.kind, self.detail)  # it must survive pickling between processes


class DefectLog:
    """Collects the refused rows; with `on_bad_row="error"`, raises at the first one."""

    def __init__(self, on_bad_row: OnBadRow = "skip"):
        if on_bad_row not in get_args(OnBadRow):
            raise TokenRatioError(f"on_bad_row is {on_bad_row!r}; it must be 'error' or 'skip'.")
        self.on_bad_row = on_bad_row
        self.defects: list[Defect] = []

    def refuse(self, origin: str, error: RowDefectError) -> None:
        """Record that the row of `origin` is left out, or raise `TokenRatioError`."""
        if self.on_bad_row == "error":
            raise TokenRatioError(
                printable(f"{origin}: {error.kind}: {error.detail}.")
                + " Correct or remove the row, or set on_bad_row to 'skip'."
            )
        self.defects.append(Defect(origin, error.kind, error.detail))

    def require_kept(self, rows_read: int, rows_kept: int) -> None:
        """Raise `TokenRatioError` unless a row is left."""
        if rows_kept:
            return
        if not rows_read:
            raise TokenRatioError("The data source has no rows.")
        first = self.defects[0]
        raise TokenRatioError(
            printable(
                f"None of the {rows_read} rows can be used; the first, {first.origin}: "
                f"{first.kind}: {first.detail}."
            )
            + " Run `tokenratio inspect-data` on the source."
        )
