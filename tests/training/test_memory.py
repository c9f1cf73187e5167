"""The memory estimate counts what can be counted."""

from tiny import tiny_model
from tokenratio import TokenRatioConfig
from tokenratio.statistics.chunks import default_chunk_size
from tokenratio.training.memory import estimate_memory


def estimate(tmp_path, *, trainable=None, tokens=32, reference_copy=True, **settings):
    args = TokenRatioConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    return estimate_memory(
        tiny_model().config,
        args,
        tokens_per_row=tokens,
        trainable_parameters=trainable,
        reference_copy=reference_copy,
    )


def test_weights_reference_gradients_and_optimizer(tmp_path):
    size = sum(parameter.numel() for parameter in tiny_model().parameters())
    full = estimate(tmp_path)
    assert full.parameters == size
    assert full.parts["policy weights"] == full.parts["reference weights"] == 4 * size
    assert full.parts["gradients"] == full.parts["optimizer state (rmsprop)"] == 4 * size
    assert (
        estimate(tmp_path, optim="adamw_torch").parts["optimizer state (adamw_torch)"] == 8 * size
    )
    lora = estimate(tmp_path, trainable=100, reference_copy=False)
    assert "reference weights" not in lora.parts
    assert lora.parts["gradients"] == 400
    assert lora.parts["policy weights"] == 4 * size + 400
    assert "reference weights" not in estimate(tmp_path, loss="sft").parts
    assert full.total == sum(full.parts.values())


def test_frozen_weights_count_in_the_precision_they_are_loaded_in(tmp_path):
    size = sum(parameter.numel() for parameter in tiny_model().parameters())
    for dtype, width in (("bfloat16", 2), ("float32", 4), ("auto", 4)):
        coarse = estimate(tmp_path, trainable=100, model_init_kwargs={"dtype": dtype})
        assert coarse.parts["policy weights"] == width * size + 400
        assert coarse.parts["reference weights"] == width * size


def test_the_chunk_is_the_engines(tmp_path):
    vocabulary = tiny_model().config.vocab_size
    part = "logits of one chunk, both models"
    held = default_chunk_size(vocabulary, "cpu")
    assert estimate(tmp_path, tokens=10**9).parts[part] == 2 * 4 * vocabulary * held
    assert estimate(tmp_path, tokens=2).parts[part] == 2 * 4 * vocabulary * 8 * 2 * 2


def test_a_cached_reference_stays_on_the_cpu(tmp_path):
    kept = {
        loss: "reference weights" in estimate(tmp_path, loss=loss, cache_reference=True).parts
        for loss in ("tbpo_a", "tbpo_q", "dpo")
    }
    assert kept == {"tbpo_a": True, "tbpo_q": False, "dpo": False}


def test_activations_grow_with_tokens_and_shrink_with_checkpointing(tmp_path):
    short = estimate(tmp_path).parts["activations"]
    assert estimate(tmp_path, tokens=64).parts["activations"] == 2 * short
    kept = estimate(tmp_path, activation_checkpointing=True).parts["activations"]
    assert kept < short  # one layer whole, and the input of each
