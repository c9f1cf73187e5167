import pytest
import torch

from tokenratio.data.worlds.reviews import ReviewWorld


@pytest.fixture(scope="session")
def world():
    return ReviewWorld()


@pytest.fixture(scope="session")
def tokenizer(world):
    return world.build_tokenizer()


@pytest.fixture
def make_policy(world):
    """Policies with random weights, large enough that they have preferences."""
    from transformers import LlamaForCausalLM

    def make(seed, **overrides):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            settings = {"hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.3}
            return LlamaForCausalLM(world.policy_config(**settings | overrides))

    return make
