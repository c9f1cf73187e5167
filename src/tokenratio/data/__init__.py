"""Data: sources → parsed and checked rows → token ids → pair-aligned batches."""

from tokenratio.data.collation import CompletionCollator, PairCollator, padding_id
from tokenratio.data.defects import Defect, DefectKind, OnBadRow, WarningKind
from tokenratio.data.files import SourceRow
from tokenratio.data.formats import CompletionExample, PreferenceExample
from tokenratio.data.inspection import check_text, inspect_rows, inspect_source
from tokenratio.data.length_grouping import LengthGroupedSampler, row_lengths
from tokenratio.data.parts import source_digest
from tokenratio.data.preparation import PreparedData, prepare_completions, prepare_pairs
from tokenratio.data.selection import Selection
from tokenratio.data.sources import (
    DataSource,
    Source,
    describe_splits,
    locate,
    read_rows,
    source_name,
)
from tokenratio.data.steps import StepCollator
from tokenratio.data.summary import DataReport, Truncation

__all__ = [
    "CompletionCollator",
    "CompletionExample",
    "DataReport",
    "DataSource",
    "Defect",
    "DefectKind",
    "LengthGroupedSampler",
    "OnBadRow",
    "PairCollator",
    "PreferenceExample",
    "PreparedData",
    "Selection",
    "Source",
    "SourceRow",
    "StepCollator",
    "Truncation",
    "WarningKind",
    "check_text",
    "describe_splits",
    "inspect_rows",
    "inspect_source",
    "locate",
    "padding_id",
    "prepare_completions",
    "prepare_pairs",
    "read_rows",
    "row_lengths",
    "source_digest",
    "source_name",
]
