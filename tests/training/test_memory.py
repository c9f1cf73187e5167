"""The memory estimate counts what can be counted."""

from tiny import tiny_model
from tokenratio import TokenRatioConfig
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
    assert "reference weights" not in estimate(tmp_path, loss="sft").parts
    assert full.total == sum(full.parts.values())


def test_activations_grow_with_tokens_and_shrink_with_checkpointing(tmp_path):
    short = estimate(tmp_path).parts["activations"]
    assert estimate(tmp_path, tokens=64).parts["activations"] == 2 * short
    assert estimate(tmp_path, activation_checkpointing=True).parts["activations"] < short
