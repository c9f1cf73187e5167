"""The memory estimate counts what can be counted, and agrees with what was measured."""

import csv
import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tiny import tiny_model
from tokenratio import TokenRatioConfig
from tokenratio.cli.plan import H100_TFLOPS, STEP_OVER_PRODUCTS
from tokenratio.cli.recipe_models import adapter_shapes
from tokenratio.models.adapters import add_adapter
from tokenratio.models.token_requests import language_model
from tokenratio.statistics.chunks import default_chunk_size
from tokenratio.training.adapter_settings import peft_config_of
from tokenratio.training.memory import (
    ACTIVATIONS,
    GRADIENTS,
    LOGITS,
    OPTIMIZER,
    POLICY,
    REFERENCE,
    AdapterShapes,
    Batch,
    Shapes,
    batch_of,
    estimate_memory,
    layer_bytes,
    moments,
)
from tokenratio.training.planning import flops

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TOLERANCE = 0.15
# `cuda_jobs` of benchmarks/jobs.py: 8 pairs of two rows of 1,024 tokens, 768 of them response.
H100_BATCH = Batch(8 * 2048, 1024, 8 * 2 * 768, weight_bytes=2, stream_bytes=2, device="cuda")


def estimate(tmp_path, *, trainable=None, tokens=32, reference_copy=True, **settings):
    args = TokenRatioConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    return estimate_memory(
        tiny_model().config,
        args,
        tokens_per_row=tokens,
        adapter=None if trainable is None else AdapterShapes(trainable, 100),
        reference_copy=reference_copy,
    )


def test_weights_reference_gradients_and_optimizer(tmp_path):
    size = sum(parameter.numel() for parameter in tiny_model().parameters())
    full = estimate(tmp_path)
    assert full.parameters == size
    assert full.parts[POLICY] == full.parts[REFERENCE] == 4 * size
    assert full.parts[GRADIENTS] == full.parts[OPTIMIZER] == 4 * size
    assert estimate(tmp_path, optim="adamw_torch").parts[OPTIMIZER] == 8 * size
    lora = estimate(tmp_path, trainable=100, reference_copy=False)
    assert REFERENCE not in lora.parts
    assert lora.parts[GRADIENTS] == 400
    assert lora.parts[POLICY] == 4 * size + 400
    assert REFERENCE not in estimate(tmp_path, loss="sft").parts
    assert full.total == sum(full.parts.values())


def test_frozen_weights_count_in_the_precision_they_are_loaded_in(tmp_path):
    size = sum(parameter.numel() for parameter in tiny_model().parameters())
    for dtype, width in (("bfloat16", 2), ("float32", 4), ("auto", 4)):
        coarse = estimate(tmp_path, trainable=100, model_init_kwargs={"dtype": dtype})
        assert coarse.parts[POLICY] == width * size + 400
        assert coarse.parts[REFERENCE] == width * size


def test_the_chunk_is_the_engines():
    vocabulary, blocks = 32_000, 4 * 4 * 2**20
    shapes = Shapes(10**8, 4, 256, 688, 256, vocabulary, is_tied=False)
    held = 2 * 4 * vocabulary * default_chunk_size(vocabulary, "cpu")
    assert moments(shapes, Batch(10**6, 100, 10**6))[0][LOGITS] == held + blocks
    assert moments(shapes, Batch(10, 10, 6))[0][LOGITS] == 2 * (2 * 4 * vocabulary * 6)


def test_a_cached_reference_stays_on_the_cpu(tmp_path):
    kept = {
        loss: REFERENCE in estimate(tmp_path, loss=loss, cache_reference=True).parts
        for loss in ("tbpo_a", "tbpo_q", "dpo")
    }
    assert kept == {"tbpo_a": True, "tbpo_q": False, "dpo": False}


def test_a_batch_has_the_settings_of_the_run(tmp_path):
    settings = {"bf16": True, "activation_checkpointing": True, "optim": "adamw_torch"}
    args = TokenRatioConfig(
        output_dir=str(tmp_path),
        loss="simpo",
        per_device_train_batch_size=3,
        gradient_accumulation_steps=1,
        model_init_kwargs={"dtype": "bfloat16"},
        **settings,
    )
    assert batch_of(tiny_model().config, args, 32, reference_copy=True) == Batch(
        tokens=6 * 32,
        length=32,
        scored=6 * 32,
        weight_bytes=2,
        stream_bytes=2,
        autocast=True,
        checkpointing=True,
        accumulates=False,
        reference_forward=False,
        reference_copy=False,
        one_pass=False,
        optimizer_states=2,
    )


def test_activations_grow_with_tokens_and_shrink_with_checkpointing(tmp_path):
    def activations(**settings):
        return estimate(tmp_path, **settings).parts[ACTIVATIONS]

    assert activations(tokens=64) > 2 * activations()  # attention's mask grows with both lengths
    assert activations(activation_checkpointing=True) < activations()


def test_accumulated_gradients_are_held_besides_the_activations():
    shapes = Shapes(10**6, 4, 64, 128, 64, 1000, is_tied=False)
    first, second = (
        moments(shapes, Batch(4096, 128, 2048, accumulates=on))[0] for on in (False, True)
    )
    assert sum(second.values()) - sum(first.values()) == 4 * shapes.parameters


@pytest.mark.parametrize(
    ("rank", "weights", "autocast", "dropout"),
    [
        (0, torch.float32, False, 0.0),
        (0, torch.float32, True, 0.0),
        (0, torch.bfloat16, False, 0.0),
        (8, torch.float32, False, 0.0),
        (8, torch.float32, True, 0.0),
        (8, torch.bfloat16, True, 0.0),
        (8, torch.bfloat16, False, 0.0),
        (8, torch.bfloat16, True, 0.1),
    ],
)
def test_a_layer_keeps_what_autograd_saves(rank, weights, autocast, dropout):
    rows, length = 3, 96
    config = llama_config(96, 1, 4, 2, 224, 40, False)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, -2:] = 0

    def saved(layers):
        config.num_hidden_layers = layers
        model = LlamaForCausalLM(config).train()
        if rank:
            adapter = {"r": rank, "target_modules": "all-linear", "lora_dropout": dropout}
            model = add_adapter(model, peft_config_of(adapter))
        for name, parameter in model.named_parameters():
            if "lora" not in name:
                parameter.data = parameter.data.to(weights)
        kept = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
        num_own = len(kept)

        def pack(tensor):
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            language_model(model).model(torch.zeros_like(mask), mask, use_cache=False)
        return sum(storage.nbytes() for storage in list(kept.values())[num_own:]), model

    more, _ = saved(2)
    one, model = saved(1)
    adapter = AdapterShapes.of(model, 1) if rank else None
    shapes = Shapes.of(config, adapter)
    batch = Batch(
        *(rows * length, length, 0),
        weight_bytes=weights.itemsize,
        stream_bytes=weights.itemsize,
        autocast=autocast,
    )
    cast = 2 * shapes.layer * (autocast and weights == torch.float32)
    if autocast and adapter is not None:
        cast += 2 * adapter.parameters
    # Not counted: an adapter's own narrow states, and one number a head and row of a norm.
    narrow = 7 * rank * batch.tokens * (2 if autocast else 4)
    counted = batch.tokens * layer_bytes(shapes, batch) + cast + narrow
    assert more - one == pytest.approx(counted, rel=0.01)


# The rows of the benchmarks whose sizes are known, with the parts that are not weights.


def llama_config(hidden, layers, heads, kv_heads, intermediate, vocabulary, tied):
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


@functools.cache
def llama(*sizes, rank=0):
    config, adapter = llama_config(*sizes), None
    if rank:
        adapter = adapter_shapes(config, {"r": rank, "target_modules": "all-linear"})
    return Shapes.of(config, adapter)


def over_the_weights(shapes, batch):
    loaded = (POLICY, REFERENCE, OPTIMIZER)
    return max(
        sum(size for name, size in parts.items() if name not in loaded)
        for parts in moments(shapes, batch)
    )


def rows(name):
    with (BENCHMARKS / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_small_steps_of_every_kind_agree_with_the_measured_peak():
    """Measured by `python benchmarks/memory.py`."""
    measured = rows("memory_results.csv")
    assert len(measured) >= 15
    wrong = {}
    for row in measured:
        sizes = ("hidden", "layers", "heads", "kv_heads", "intermediate", "vocabulary")
        shapes = llama(
            *(int(row[name]) for name in sizes),
            row["tied"] == "True",
            rank=int(row["lora_rank"]),
        )
        if float(row["dropout"]):
            shapes = dataclasses.replace(
                shapes, adapter=dataclasses.replace(shapes.adapter, has_dropout=True)
            )
        pairs, length = int(row["pairs"]), int(row["length"])
        width = getattr(torch, row["weights"]).itemsize
        batch = Batch(
            tokens=2 * pairs * length,
            length=length,
            scored=2 * pairs * (length // 2),
            weight_bytes=width,
            stream_bytes=width,
            autocast=row["autocast"] == "True",
            checkpointing=row["checkpointing"] == "True",
            one_pass=row["loss"] == "tbpo_a",
        )
        ratio = over_the_weights(shapes, batch) / int(row["peak_bytes"])
        if abs(ratio - 1) > TOLERANCE:
            wrong[row["case"]] = round(ratio, 3)
    assert not wrong


@pytest.mark.parametrize("study", ["vocabulary", "length", "pairs"])
def test_growing_steps_agree_with_the_measured_peak(study):
    """Measured by `python benchmarks/step.py`: whole fine-tuning in float32, prompts shared."""
    measured = [
        row for row in rows("results.csv") if (row["study"], row["case"]) == (study, "tbpo_a")
    ]
    assert len(measured) == 5
    for row in measured:
        size = int(row["x"])
        response = size if study == "length" else 192
        pairs = {"length": 2, "pairs": size}.get(study, 4)
        shorter = round(0.55 * response)
        length = response // 2 + 2 * shorter
        batch = Batch(pairs * length, length, 2 * pairs * shorter)
        shapes = llama(256, 4, 4, 4, 688, int(row["vocabulary"]), False)
        ratio = over_the_weights(shapes, batch) / int(row["peak_bytes"])
        assert abs(ratio - 1) <= TOLERANCE, (study, size, ratio)


def test_a_step_on_an_h100_agrees_with_the_measured_peak():
    """Whole fine-tuning with bfloat16 weights: `python benchmarks/step.py --device cuda`."""
    row = on_h100("tbpo_a")
    ratio = over_the_weights(shapes_on_h100(), H100_BATCH) / int(row["peak_bytes"])
    assert abs(ratio - 1) <= TOLERANCE


def test_the_plan_takes_its_rates_from_the_benchmark():
    product, step = on_h100("matrix_product"), on_h100("tbpo_a")
    rate = 2 * 2048 * 4096 * 128_256 / float(product["seconds"])
    assert round(rate / 1e12) == H100_TFLOPS
    computed = flops(shapes_on_h100(), H100_BATCH) / rate
    assert round(float(step["seconds"]) / computed, 2) == STEP_OVER_PRODUCTS


def shapes_on_h100():
    return llama(4096, 8, 32, 8, 14_336, 128_256, False)


def on_h100(case):
    (row,) = (r for r in rows("results.csv") if (r["device"], r["case"]) == ("cuda", case))
    return row
