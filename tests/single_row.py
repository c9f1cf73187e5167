"""One row, parsed by itself."""

from tokenratio.data import CompletionExample, PreferenceExample
from tokenratio.data.formats import DataParser


def parse_preference(row, columns=None) -> PreferenceExample:
    return DataParser([[row]], PreferenceExample, columns).parse(row)


def parse_completion(row, columns=None) -> CompletionExample:
    return DataParser([[row]], CompletionExample, columns).parse(row)
