"""A small tokenizer, pairs of words, and tiny models of every family, for any test to build."""

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

WORDS = ["ash", "bay", "cow", "dew", "elm", "fig", "gum", "hay", "ivy", "jam", "kin", "log"]
VOCABULARY = ["<pad>", "<bos>", "<eos>", "<unk>", *WORDS]

# One entry per architecture the library promises: its config's type and what is peculiar to it.
FAMILIES = {
    "llama": {"model_type": "llama"},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    # the second layer without positions; every fourth in the real one
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 2},
    "mistral": {"model_type": "mistral", "sliding_window": 4},
    "gpt2": {"model_type": "gpt2"},
    "gpt_neox": {"model_type": "gpt_neox"},
    "gemma2": {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 3.0},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 8},
    "phi": {"model_type": "phi"},  # its output head has a bias
}


def tiny_model(family: str = "llama", *, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A model of about 5,000 parameters over `VOCABULARY`, with weights large enough to differ."""
    settings = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **FAMILIES[family],
        **overrides,
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(0.05 * torch.randn_like(parameter))
    model.tie_weights()
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; adds nothing by itself."""
    vocabulary = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def word_pairs(num: int, *, seed: int = 0, longest: int = 7) -> list[dict[str, str]]:
    """Pairs of random words, of unequal lengths, no two sides alike."""
    rng = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))

    pairs = []
    while len(pairs) < num:
        pair = {"prompt": words(4), "chosen": words(longest), "rejected": words(longest)}
        if pair["chosen"] != pair["rejected"]:
            pairs.append(pair)
    return pairs
