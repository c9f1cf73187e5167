"""The models of an evaluation: loaded when needed, and gone when not."""

import gc
import weakref

import pytest

from tiny import tiny_model
from tokenratio.evaluation.inputs import ModelPool
from tokenratio.models.loading import check_model


@pytest.fixture
def no_collection():
    """Python frees by reference count only, unless it is asked to collect."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("samples", [False, True])
def test_a_model_that_has_scored_is_gone_before_the_next_is_loaded(
    samples, tmp_path, no_collection
):
    paths = [str(tmp_path / name) for name in ("first", "second", "kept")]
    for path in paths:
        tiny_model().save_pretrained(path)
    pool = ModelPool([paths[2]])
    if samples:
        pool.sampling_dtype = "bfloat16"
    kept, first = (weakref.ref(pool.model(path)) for path in (paths[2], paths[0]))
    for each in (kept, first):
        check_model(each())
    pool.sampling_model(paths[1])
    assert first() is None
    assert kept() is pool.model(paths[2])
