"""Fixtures and settings for all tests."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tiny import tiny_tokenizer

torch.set_num_threads(1)  # the models are tiny; more threads only wait for each other

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture
def data_folder() -> Path:
    if not DATA.is_dir():
        pytest.skip(f"no preference data at {DATA}")
    return DATA
