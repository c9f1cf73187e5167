"""Small GGUF files, written as llama.cpp's converter writes those of Llama models."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tiny import tiny_model
from tokenratio.data.vocabulary import train_byte_level_bpe

TEXTS = ["the cow ate the hay", "a fig and a gum on the elm log", "kin of the ivy, 12 or 345 of it"]
CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}<|eos|>\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
_CONTROL, _NORMAL = 3, 1


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template; adds BOS."""
    tokenizer = train_byte_level_bpe(TEXTS, 300)
    tokenizer.chat_template = CHAT
    return tokenizer


def byte_model(tokenizer: PreTrainedTokenizerFast, **overrides: Any) -> PreTrainedModel:
    """A Llama whose every row of weights is a multiple of a block of 32."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 1}
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vocabulary = -(-len(tokenizer) // 32) * 32
    return tiny_model(**{"vocab_size": vocabulary, **size, **ends, **overrides})


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast | None,
    kind: str = "F32",
    *,
    pre: str = "gpt-2",
    more: dict[str, Any] | None = None,
    extra_tensors: dict[str, np.ndarray] | None = None,
    leave_out: str = "",
) -> dict[str, np.ndarray]:
    """Write a model; returns what each tensor holds after it is dequantised, by llama.cpp's name.

    Args:
        kind: the quantisation of matrices, such as `Q4_1`; vectors stay in float32.
        pre: llama.cpp's name of how texts are split before BPE.
        more: further or other metadata, texts or whole numbers.
        leave_out: a tensor that is not written.
    """
    config = model.config
    more = dict(more or {})
    architecture = more.pop("general.architecture", "llama")
    writer = GGUFWriter(str(path), architecture)
    writer.add_name("A title")
    writer.add_type(more.pop("general.type", "model"))
    writer.add_file_type(LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer, config.vocab_size, pre)
    for key, value in more.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    written = {}
    for name, weight in _llama_tensors(model).items():
        if name == leave_out:
            continue
        stored = GGMLQuantizationType[kind if weight.ndim == 2 else "F32"]
        data = gguf.quants.quantize(weight, stored)
        writer.add_tensor(name, data, raw_dtype=stored)
        written[name] = gguf.quants.dequantize(data, stored)
    for name, data in (extra_tensors or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def _add_tokenizer(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast, size: int, pre: str
) -> None:
    ids = {id: token for token, id in tokenizer.get_vocab().items()}
    special = set(tokenizer.all_special_ids)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([ids.get(id, f"[PAD{id}]") for id in range(size)])
    writer.add_token_types(
        [_CONTROL if id in special else _NORMAL if id in ids else 5 for id in range(size)]
    )
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(True)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _llama_tensors(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The weights by llama.cpp's names, queries and keys in its order of rotary pairs."""
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = tensor.float().numpy()
        for part, heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", config.num_key_value_heads),
        ):
            if part in name:
                halves = weight.reshape(heads, 2, -1, weight.shape[-1])
                weight = halves.swapaxes(1, 2).reshape(weight.shape)
        tensors[f"{names.get_name(name.removesuffix('.weight'))}.weight"] = weight
    return tensors
