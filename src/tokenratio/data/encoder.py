"""Examples to token ids, in batches and processes: rendered, tokenised, truncated."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from tokenratio.data.chat import RenderedExample, render
from tokenratio.data.defects import DefectKind, RowDefectError
from tokenratio.data.encoding import EncodedExample, Limits, SpecialTokens, assemble, tokenise
from tokenratio.data.formats import AnyExample
from tokenratio.data.omissions import describe_omissions, left_out
from tokenratio.data.template import TemplateSettings, TurnEnd
from tokenratio.errors import TokenRatioError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rows rendered and tokenised at once, which bounds the memory of texts and Python integers.
_BATCH_SIZE = 512


@dataclass(frozen=True)
class RowEncoder:
    """Encodes examples; the same in any process.

    Attributes:
        sides: names of the responses.
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
        """Each example encoded, or why it cannot be, in order."""
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
    """The error, with the template's omissions if they made both sides the same tokens."""
    of_responses = {side: missing[side] for side in sides if side in missing}
    if error.kind is not DefectKind.IDENTICAL_TOKENS or not of_responses:
        return error
    return RowDefectError(
        error.kind,
        f"the template leaves out what tells them apart: {describe_omissions(of_responses)}; set "
        "chat_template to one that renders it, or give the rows as text",
    )


_function: Callable[[Any], Any] | None = None


def map_in_processes(
    function: Callable[[Any], Any], batches: Sequence[Any], num_proc: int
) -> Iterator[Any]:
    """The results of `function` for each batch, in order.

    Processes are forked if the system can: the function is then not pickled, and a program without
    `if __name__ == "__main__"` is not run again.

    Args:
        function: sent to each process once; batches and results are pickled.
        num_proc: 1 to stay in this process.
    Raises:
        TokenRatioError: a process was killed.
    """
    num_proc = min(num_proc, len(batches))
    if num_proc <= 1:
        yield from map(function, batches)
        return
    forks = "fork" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if forks else "spawn")
    with _one_thread_each():
        pool = ProcessPoolExecutor(num_proc, context, _set_function, (function,))
        try:
            yield from pool.map(_call, batches)
        except BrokenProcessPool as error:
            raise TokenRatioError(
                f"one of {num_proc} data-preparation processes was killed, possibly out of "
                "memory: lower dataset_num_proc"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _set_function(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function


def _call(batch: Any) -> Any:
    assert _function is not None
    return _function(batch)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Keep tokenizers from starting threads in every process, and from warning about it."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
