"""A tokenizer trained from the data, for policies trained from scratch."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tokenratio.errors import TokenRatioError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>")


def train_byte_level_bpe(texts: Iterable[str], vocabulary_size: int) -> "PreTrainedTokenizerFast":
    """A byte-level BPE of at most `vocabulary_size` tokens: lossless on any text, BOS in front.

    Raises:
        TokenRatioError: a vocabulary that does not hold all bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(_SPECIAL)
    if vocabulary_size < smallest:
        raise TokenRatioError(f"byte_level_bpe must be at least {smallest}, not {vocabulary_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(_SPECIAL),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos = _SPECIAL
    bos_id = tokenizer.token_to_id(bos)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, bos_id)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos
    )
