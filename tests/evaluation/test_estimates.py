"""Standard errors of values that come in groups."""

import math
import statistics

import pytest

from tokenratio.evaluation.estimates import clustered_mean


def test_standard_errors():
    values = [1.0, 4.0, 2.0, 8.0]
    alone = clustered_mean(values, range(4))
    assert alone.standard_error == pytest.approx(statistics.stdev(values) / 2)
    # samples that repeat their prompt's value add nothing
    repeated = clustered_mean(values * 3, [*range(4)] * 3)
    assert repeated.standard_error == pytest.approx(alone.standard_error)
    assert repeated.num == 12
    assert math.isnan(clustered_mean(values, ["one"] * 4).standard_error)
    nothing = clustered_mean([], [])
    assert (math.isnan(nothing.mean), nothing.num) == (True, 0)
