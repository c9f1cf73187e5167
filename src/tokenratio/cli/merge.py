"""`tokenratio merge ADAPTER ...`: merges adapters into their base model."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenratio.cli.command import Command
from tokenratio.errors import TokenRatioError
from tokenratio.settings import option

USAGE = """usage: tokenratio merge ADAPTER [ADAPTER ...] --output FOLDER [--flag value ...]

Merges adapters into the model they were trained on and saves it with its tokenizer; loading the
result does not need peft. ADAPTER is a folder or hub name; if its base is an adapter too, that one
is merged first. Several adapters are merged in the given order. The first may be a GGUF file, which
is dequantised.
"""


@dataclass(frozen=True)
class MergeOptions:
    """Settings of `merge`."""

    output: str = option("", "Output folder; must not exist yet.")
    dtype: str = option(
        "float32",
        "Precision of the saved weights (auto: that of the base); merging sums in float32 or "
        "higher. bfloat16 halves the size but can lose small updates, with a warning.",
    )

    def __post_init__(self) -> None:
        if not self.output:
            raise TokenRatioError("merge needs --output")
        if Path(self.output).expanduser().exists():
            raise TokenRatioError(f"{self.output} already exists: choose another --output")


def merge(adapters: Sequence[str], options: MergeOptions) -> None:
    """Merge, save and print what was done."""
    import shutil

    from tokenratio.cli.terminal import quiet_libraries, user_mistakes
    from tokenratio.models.adapters import has_adapter, load_adapter, merge_adapters
    from tokenratio.models.gguf import is_gguf
    from tokenratio.models.loading import load_model, load_tokenizer
    from tokenratio.models.provenance import absolute, chain_of, origin_of, saved_adapter

    quiet_libraries()
    if not is_gguf(adapters[0]) and not chain_of(adapters[0])[2]:
        raise TokenRatioError(f"{adapters[0]} is not an adapter: there is nothing to merge")
    notes = []
    for below, name in itertools.pairwise(adapters):
        adapter = saved_adapter(name, {})
        if adapter is None:
            raise TokenRatioError(f"{name} is not an adapter")
        if adapter.base != absolute(below):
            notes.append(f"note: {name} names {adapter.base} as its base, not {below}")
    model = load_model(adapters[0], {"dtype": options.dtype})
    for name in adapters[1:]:
        model = load_adapter(model, absolute(name), {})
    tokenizer = load_tokenizer(adapters[-1])
    joined = str(origin_of(model))
    done = "dequantised"
    if has_adapter(model):
        model, done = merge_adapters(model), "merged"
    folder = Path(options.output).expanduser()
    with user_mistakes(f"cannot write {folder}"):
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # leave no incomplete model
            raise
    print(*notes, f"{joined}: {done} in {options.dtype}, saved in {folder}", sep="\n")


COMMAND = Command(USAGE, merge, argument="one or more adapters", several=True, options=MergeOptions)
