"""Models, pairs and hostile texts for the tests of the token-credit viewer."""

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tiny import WORDS, tiny_model, tiny_tokenizer
from tokenratio import InspectOptions, inspect_pairs

# What a page must show harmlessly and legibly.
HOSTILE = {
    "script": "<script>document.title='caught'</script>",
    "end of style": "</style><style>*{display:none}</style>",
    "end of script": '</script><img src=x onerror="document.title=1">',
    "comment": "<!-- <script> -->",
    "template": "{{ 7 * 7 }} {% raw %} ${1+1}",
    "bidi": "safe \u202egnp.exe\u202c end \u2066isolate\u2069",
    "zero width": "zero\u200bwidth\u200djoiner\ufeff",
    "separators": "line\u2028paragraph\u2029end",
    "controls": "bell\x07 escape\x1b[2J null\x00 tab\t return\r newline\n",
    "emoji": "family 👨‍👩‍👧 flag 🇩🇪 smile 😊",
    "split": "naïve €5 — 日本語 ok",
    "hebrew": "שלום עולם, 123 abc",
    "arabic": "مرحبا بالعالم",
    "marks": "\u0301combining e\u0301 start",
    "brackets": "a⟨E2⟩b & \"quotes\" 'single' `tick`",
}
LONG = "x" * 10_000


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, except for a few longer ones: every other character is split."""
    vocabulary = {character: index for index, character in enumerate(bytes_to_unicode().values())}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>"
    )
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False) for text in (LONG, "<script>", "</script>", "\u202e")]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tag|>"]})
    return tokenizer


def save_policies(folder: Path, tokenizer: PreTrainedTokenizerFast, *, positions: int = 512):
    """A policy and its reference, of the tokenizer's size, in folders."""
    for name, seed in (("reference", 0), ("policy", 1)):
        model = tiny_model(
            seed=seed,
            vocab_size=len(tokenizer),
            max_position_embeddings=positions,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder / "policy", folder / "reference"


def write_pairs(path: Path, pairs) -> Path:
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return path


def hostile_pairs() -> list[dict[str, str]]:
    """Each text as prompt, as chosen and as rejected response; one response has the long token."""
    pairs = [
        {"prompt": f"{name}: {text}", "chosen": text, "rejected": f"not {text[::-1]}"}
        for name, text in HOSTILE.items()
    ]
    return [*pairs, {"prompt": "long", "chosen": f"a {LONG} b", "rejected": "short <|tag|> text"}]


def long_inspection(folder, *, num_pairs, length):
    """Pairs whose responses have `length` tokens, at most, under a policy of the words' size."""
    rng = random.Random(0)
    policy, reference = save_policies(folder, tiny_tokenizer(), positions=2 * length)

    def words_(num):
        return " ".join(rng.choice(WORDS) for _ in range(num))

    pairs = [
        {"prompt": words_(8), "chosen": words_(length - 1 - i % 3), "rejected": words_(length - 1)}
        for i in range(num_pairs)
    ]
    data = write_pairs(folder / "pairs.jsonl", pairs)
    options = InspectOptions(reference=str(reference), data=str(data), num_pairs=num_pairs)
    return inspect_pairs([policy], options, report=lambda line: None)
