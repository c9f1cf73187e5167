import pytest


@pytest.fixture(scope="session")
def tokenizer(world):
    return world.build_tokenizer()
