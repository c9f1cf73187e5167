"""Examples to token ids, in batches: rendered, tokenised, truncated."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

from tokenratio.data.chat import RenderedExample, render
from tokenratio.data.defects import DefectKind, RowDefectError
from tokenratio.data.encoding import EncodedExample, Limits, SpecialTokens, assemble, tokenise
from tokenratio.data.formats import AnyExample
from tokenratio.data.omissions import describe, left_out
from tokenratio.data.processes import map_in_processes
from tokenratio.data.template import TemplateSettings, TurnEnd

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rows rendered and tokenised at once: bounds the text and the Python integers alive together.
_BATCH_SIZE = 512


@dataclass(frozen=True)
class RowEncoder:
    """Encodes examples; the same in any process.

    Attributes:
        sides: what the responses are called.
        end: `turn_end` of tokenizer and template.
    """

    sides: tuple[str, ...]
    tokenizer: "PreTrainedTokenizerBase"
    special: SpecialTokens
    limits: Limits
    template: TemplateSettings
    end: TurnEnd | None

    def encode(
        self, examples: Sequence[AnyExample], num_proc: int = 1
    ) -> Iterator[EncodedExample | RowDefectError]:
        """Each example encoded, or why it cannot be, in order; in several processes if wanted."""
        batches = [examples[i : i + _BATCH_SIZE] for i in range(0, len(examples), _BATCH_SIZE)]
        return chain.from_iterable(map_in_processes(self.encode_batch, batches, num_proc))

    def encode_batch(self, examples: Sequence[AnyExample]) -> list[EncodedExample | RowDefectError]:
        """As `encode`, for one batch."""
        rendered = [self._render(example) for example in examples]
        texts = [text for text in rendered if isinstance(text, RenderedExample)]
        ids = iter(tokenise(self.tokenizer, texts, self.special) if texts else [])
        return [
            text if isinstance(text, RowDefectError) else self._assemble(example, text, next(ids))
            for example, text in zip(examples, rendered, strict=True)
        ]

    def _render(self, example: AnyExample) -> RenderedExample | RowDefectError:
        try:
            return render(example, self.tokenizer, self.template, self.end)
        except RowDefectError as error:
            return error

    def _assemble(
        self, example: AnyExample, text: RenderedExample, ids: "tuple[list[int], ...]"
    ) -> EncodedExample | RowDefectError:
        missing = left_out(example, text, self.tokenizer, self.template)
        try:
            encoded = assemble(ids, self.sides, self.special, self.limits)
            return replace(encoded, left_out=missing)
        except RowDefectError as error:
            return _explained(error, missing, self.sides)


def _explained(
    error: RowDefectError, missing: Mapping[str, str], sides: tuple[str, ...]
) -> RowDefectError:
    """A pair whose two sides are the same tokens because of what the template leaves out."""
    of_responses = {side: missing[side] for side in sides if side in missing}
    if error.kind is not DefectKind.IDENTICAL_TOKENS or not of_responses:
        return error
    return RowDefectError(
        error.kind,
        f"the template leaves out what tells them apart: {describe(of_responses)}; set "
        "chat_template to one that renders it, or give the rows as text",
    )
