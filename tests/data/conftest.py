"""Tiny tokenizers of every temper, built here so that no test needs the network."""

from collections.abc import Callable

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "the sky is blue and the grass is green",
    "Human: what is the colour of the sky? Assistant: the sky is blue.",
    "user assistant system\n a b c d e f good bad so so",
]


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _word_level() -> Tokenizer:
    words = [*SPECIAL, "the", "sky", "is", "blue", "green", "good", "bad", "so", *"abcdef"]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _sentencepiece_like() -> Tokenizer:
    """Puts a space of its own before every text, as Llama 2 and Mistral do."""
    pieces = [*SPECIAL, "▁", "\n", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.:?,"]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return tokenizer


def _letter_b() -> Tokenizer:
    """Knows one letter and drops every other."""
    vocab = {piece: index for index, piece in enumerate([*SPECIAL, "b"])}
    return Tokenizer(models.BPE(vocab, []))


BUILDERS = {
    "bytes": _byte_level,
    "words": _word_level,
    "sentencepiece": _sentencepiece_like,
    "letter_b": _letter_b,
}
MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """Builds a tokenizer: `make(kind, bos=…, appends_eos=…, eos=…, template=…, **special)`."""

    def make(
        kind: str = "bytes",
        *,
        bos: bool = False,
        appends_eos: bool = False,
        eos: str = "</s>",
        template: str | None = None,
        **special: str | None,
    ) -> PreTrainedTokenizerFast:
        tokenizer = BUILDERS[kind]()
        front, back = "<s> " * bos, f" {eos}" * appends_eos
        if front or back:
            ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", eos)]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{front}$A{back}", special_tokens=ids
            )
        names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": eos, **special}
        wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
        wrapped.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        wrapped.chat_template = template
        return wrapped

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    """Byte-level BPE that adds nothing by itself."""
    return make_tokenizer("bytes")


@pytest.fixture(scope="session")
def chat_tokenizer(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    """ChatML: a turn ends with the EOS token and a newline."""
    return make_tokenizer("bytes", eos="<|im_end|>", template=CHATML)
