"""GGUF, the format of llama.cpp: a file as a model, dequantised, with the tokenizer in it."""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import tokenizers
import transformers.modeling_gguf_pytorch_utils as transformers_gguf
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.integrations.gguf.reader import GgufHeader, read_gguf_metadata
from transformers.utils import logging as transformers_logging

from tokenratio.errors import TokenRatioError, reported_as
from tokenratio.models.pretrained_arguments import DATA_ALONE, WHERE_KWARGS
from tokenratio.models.weights import require_whole
from tokenratio.run_folder import package_version

_log = logging.getLogger(__name__)

# The tensors of a RoPE whose frequencies are scaled one by one, which transformers leaves out.
_SCALED_ROPE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# Pre-tokenisers of llama.cpp that split digits one by one, then as GPT-2 does. transformers would
# split these as GPT-2 does alone.
_DIGIT_BY_DIGIT = (
    "smollm",
    "starcoder",
    "refact",
    "command-r",
    "codeshell",
    "exaone",
    "minerva-7b",
)
_AS_GPT2 = ("gpt-2", "olmo", "default")


def is_gguf(name: str | Path) -> bool:
    """Whether a model's name is that of a GGUF file."""
    return str(name).lower().endswith(".gguf") and not os.path.isdir(name)


def require_gguf(what: str) -> None:
    """Raise `TokenRatioError` if the package `gguf`, which `what` needs, is missing."""
    if find_spec("gguf") is None:
        raise TokenRatioError(f"{what} needs the package gguf: pip install 'tokenratio[gguf]'")


def quantisation(path: str | Path) -> str:
    """How the file says that its weights are stored, such as `Q4_1` or `F16`; "" if it does not."""
    from gguf import LlamaFileType

    kind = _metadata(path).get("general.file_type")
    if kind not in [each.value for each in LlamaFileType]:
        return ""
    return LlamaFileType(kind).name.removeprefix("MOSTLY_").removeprefix("ALL_")


def load_gguf(path: str | Path, arguments: Mapping[str, Any]) -> PreTrainedModel:
    """The causal language model in a file, as if it had been loaded from a folder of safetensors.

    Args:
        arguments: of `from_pretrained`; those about where to find files are ignored.
    Raises:
        TokenRatioError: `gguf` is not installed, or the file is broken or holds something else.
    """
    how = {key: value for key, value in arguments.items() if key not in WHERE_KWARGS}
    if how.pop("quantization_config", None) is not None:
        raise TokenRatioError(
            f"{path}: quantization_config does not apply to a GGUF file, which is dequantised: "
            "remove it, or use the model's safetensors"
        )
    config = load_gguf_config(path)
    # Its bar is drawn with tqdm itself, whatever the switch of transformers says.
    cast(Any, transformers_gguf).tqdm = transformers_logging.tqdm
    with reported_as(f"cannot load the weights of {path}"), _alone(path) as files:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **files,
            **how,
            config=config,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    model, info = loaded
    require_whole(model, info["missing_keys"], info["unexpected_keys"], f"cannot load {path}")
    model.config.name_or_path = model.name_or_path = str(path)
    model.generation_config.eos_token_id = gguf_ends(path)
    return model


def load_gguf_config(path: str | Path) -> PretrainedConfig:
    """The configuration that a file describes; raises `TokenRatioError` as `load_gguf` does."""
    metadata = _metadata(path)
    readers = f"gguf {package_version('gguf')} and transformers {package_version('transformers')}"
    with reported_as(f"cannot load {path} with {readers}"), _alone(path) as files:
        config = AutoConfig.from_pretrained(**files, **DATA_ALONE)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = metadata["general.architecture"]
        raise TokenRatioError(f"{path} holds a model of kind {kind}, not a causal language model")
    config.name_or_path = str(path)
    config.__dict__.pop("_model_name_or_path", None)  # a title, such as `Llama 3 8B`
    return config


def load_gguf_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer and chat template in a file; raises `TokenRatioError` as `load_gguf` does."""
    metadata = _metadata(path)
    if "tokenizer.ggml.tokens" not in metadata:
        raise TokenRatioError(
            f"{path} has no tokenizer in it: name another (tokenizer in a recipe, processing_class "
            "of a trainer), or use a file that has one"
        )
    with reported_as(f"cannot load the tokenizer of {path}"), _alone(path) as files:
        tokenizer = AutoTokenizer.from_pretrained(**files, **DATA_ALONE)
    tokenizer.name_or_path = str(path)
    _remove_made_up_tokens(tokenizer, metadata["tokenizer.ggml.tokens"])
    _split_as_trained(tokenizer, metadata, path)
    return tokenizer


def gguf_ends(path: str | Path) -> list[int] | None:
    """The ids that end generation: EOS, and the end of a turn if the file names another."""
    metadata = _metadata(path)
    keys = (f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot"))
    return sorted({metadata[key] for key in keys if key in metadata}) or None


def _metadata(path: str | Path) -> dict[str, Any]:
    """The file's metadata, without its lists of texts; refuses a file that holds no whole model."""
    require_gguf(f"reading {path}")
    with reported_as(f"{path} is not a GGUF file, or a broken one"):
        metadata, tensors = read_gguf_metadata(str(path))
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise TokenRatioError(f"{path} holds only a part of a model ({kind})")
    if metadata.get("split.count", 1) > 1:
        raise TokenRatioError(
            f"{path} is one of {metadata['split.count']} parts of a model: join them with "
            "`llama-gguf-split --merge`"
        )
    if scaled := [name for name in tensors if name in _SCALED_ROPE]:
        raise TokenRatioError(
            f"{path} scales its rotary embedding ({scaled[0]}), which transformers does not read "
            "from GGUF, so the model would compute something else: use its safetensors"
        )
    _check_size(path)
    return metadata


def _check_size(path: str | Path) -> None:
    try:
        header = GgufHeader.from_file(str(path))
    except ValueError:  # a quantisation whose size only `gguf` knows
        return
    needed = max((header.data_start + t.offset + t.nbytes for t in header.tensors), default=0)
    if (size := os.path.getsize(path)) < needed:
        raise TokenRatioError(
            f"{path} is cut off: it has {size:,} bytes of at least {needed:,}; copy or download it "
            "again"
        )


@contextmanager
def _alone(path: str | Path) -> Iterator[dict[str, Any]]:
    """Arguments of `from_pretrained` that read the file and nothing that lies beside it."""
    with TemporaryDirectory() as folder:
        name = Path(path).name
        os.symlink(os.path.abspath(path), Path(folder, name))
        yield {"pretrained_model_name_or_path": folder, "gguf_file": name}


def _remove_made_up_tokens(tokenizer: Any, num_tokens: int) -> None:
    """Remove tokens that are not in the file, such as the `<|endoftext|>` of a GPT-2 tokenizer.

    transformers adds it, and the model has no embedding for it.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    own = [token for token in backend["added_tokens"] if token["id"] < num_tokens]
    if own != backend["added_tokens"]:
        backend["added_tokens"] = own
        tokenizer._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(backend))


def _split_as_trained(tokenizer: Any, metadata: Mapping[str, Any], path: str | Path) -> None:
    """Split texts before BPE as the model was trained, where transformers does not."""
    split = metadata.get("tokenizer.ggml.pre", "default")
    if metadata.get("tokenizer.ggml.model") != "gpt2" or split in GGUF_PRE_TOKENIZER_SPLITS:
        return
    if split in _DIGIT_BY_DIGIT:
        pre = tokenizers.pre_tokenizers
        tokenizer.backend_tokenizer.pre_tokenizer = pre.Sequence(
            [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
        )
    elif split not in _AS_GPT2:
        _log.warning(
            "%s: its pre-tokeniser %r is not known, so texts are split as by GPT-2 and may become "
            "other tokens than in the model's training",
            path,
            split,
        )
