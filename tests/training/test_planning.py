"""Sharding, arithmetic and communication of a plan."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from tokenratio.cli.plan import PlanOptions, best, estimates
from tokenratio.errors import TokenRatioError
from tokenratio.models.adapters import add_adapter
from tokenratio.training.adapter_settings import peft_config_of
from tokenratio.training.memory import (
    GRADIENTS,
    OPTIMIZER,
    POLICY,
    REFERENCE,
    AdapterShapes,
    Batch,
    Shapes,
    moments,
)
from tokenratio.training.planning import SHARDINGS, flops, sharded, traffic

EIGHT = Shapes(8_030_261_248, 32, 4096, 14_336, 4096, 128_256, is_tied=False)
LORA = replace(EIGHT, adapter=AdapterShapes(83_886_080, 6 * 4096 + 14_336))
BATCH = Batch(4096, 2048, 4096, autocast=True, device="cuda")
T = 4 * EIGHT.parameters


def share(sharding, batch=BATCH, gpus=8, shapes=EIGHT):
    return sharded(moments(shapes, batch)[3], shapes, batch, sharding, gpus)


def test_one_gpu_shards_nothing():
    for sharding in SHARDINGS:
        assert share(sharding, gpus=1) == moments(EIGHT, BATCH)[3]


def test_ddp_adds_its_buckets_and_shards_nothing():
    assert share("DDP") == {**moments(EIGHT, BATCH)[3], "DDP's gradient buckets": T}


def test_what_each_sharding_divides():
    fsdp, two, three = share("FSDP2"), share("ZeRO-2"), share("ZeRO-3")
    assert fsdp[POLICY] == fsdp[REFERENCE] == fsdp[OPTIMIZER] == fsdp[GRADIENTS] == T / 8
    assert (two[POLICY], two[REFERENCE], two[OPTIMIZER]) == (T / 2, T, T / 8)
    assert (three[POLICY], three[REFERENCE]) == (T / 16, T / 16)
    # bfloat16 gradients as they come, float32 ones for the update
    assert two[GRADIENTS] == three[GRADIENTS] == T * 1.5 / 8
    assert three["float32 weights of the optimizer"] == T / 8


def test_fsdp2_keeps_accumulated_gradients_whole():
    assert share("FSDP2", replace(BATCH, accumulates=True))[GRADIENTS] == T


def test_communication():
    assert traffic(EIGHT, BATCH, "DDP", 8, 4) == 2 * T * 7 / 8
    assert traffic(LORA, BATCH, "DDP", 2, 4) == 4 * 83_886_080
    weights = 2 * EIGHT.parameters  # in bfloat16: forward, backward, reference
    assert traffic(EIGHT, BATCH, "FSDP2", 8, 2) == (2 * 3 * weights + T) * 7 / 8
    assert traffic(EIGHT, BATCH, "ZeRO-3", 8, 2) == (2 * 3 * weights + T) * 7 / 8
    assert traffic(EIGHT, BATCH, "ZeRO-2", 8, 1) == T * 7 / 8
    assert {traffic(EIGHT, BATCH, name, 1, 1) for name in SHARDINGS} == {0}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [0, 8])
def test_operations_are_those_that_pytorch_counts(rank, checkpointing):
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=160,
        vocab_size=50,
    )
    model = LlamaForCausalLM(config).train()
    body, shapes = model.model, Shapes.of(config)
    if checkpointing:
        model.activation_checkpointing_enable()
    if rank:
        adapted = add_adapter(model, peft_config_of({"r": rank, "target_modules": "all-linear"}))
        shapes = replace(shapes, adapter=AdapterShapes.of(adapted, 6))
    tokens = torch.zeros(3, 4, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        body(tokens, use_cache=False).last_hidden_state.sum().backward()
    batch = Batch(12, 4, 0, checkpointing=checkpointing, reference_forward=False)
    # A frozen first layer needs no gradient of its input.
    assert flops(shapes, batch) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_operations_at_the_head():
    products = 2 * EIGHT.head * 100
    step = Batch(0, 1, 100)
    assert flops(EIGHT, step) == 4 * products  # two models' logits, two gradients
    assert flops(LORA, step) == 3 * products
    assert flops(EIGHT, replace(step, one_pass=False)) == 5 * products
    assert flops(EIGHT, replace(step, reference_forward=False)) == 3 * products


def found(shapes, sharding, *, gpu_memory=80.0, pairs=4, **settings):
    options = PlanOptions(gpu_memory=gpu_memory, **settings)
    return list(estimates(shapes, BATCH, sharding, pairs, options))


def test_the_first_split_that_fits_is_chosen():
    every = found(EIGHT, "ZeRO-3")
    splits = [(4, 1), (2, 2), (1, 4)]
    assert [one.split for one in every] == splits * 2
    assert [one.checkpointing for one in every] == [False] * 3 + [True] * 3
    assert best(every) is next(one for one in every if one.fits)
    assert all(one.fits == (one.memory.total <= 72 * 2**30) for one in every)
    assert best(found(EIGHT, "ZeRO-3", gpu_memory=1000.0)).split == (4, 1)
    none = best(found(EIGHT, "DDP"))
    assert not none.fits
    assert none.memory.total == min(one.memory.total for one in found(EIGHT, "DDP"))


def test_time_is_work_over_rate_and_communication_over_bandwidth():
    slow, fast = (found(EIGHT, "FSDP2", tflops=rate)[0].seconds for rate in (100.0, 200.0))
    assert slow == 2 * fast
    linked = found(EIGHT, "FSDP2", tflops=100.0, bandwidth=50.0)[0]
    assert linked.seconds == pytest.approx(slow + linked.sent / 50e9)


@pytest.mark.parametrize("name", ["gpus", "gpu_memory", "tflops", "bandwidth"])
def test_options_are_positive(name):
    with pytest.raises(TokenRatioError, match=name):
        PlanOptions(**{name: 0})
