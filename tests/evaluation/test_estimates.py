"""Standard errors of values that come in groups."""

import math
import statistics

import pytest

from tokenratio.evaluation.estimates import clustered_mean


def test_standard_errors():
    values = [1.0, 4.0, 2.0, 8.0]
    alone = clustered_mean(values, [1] * 4)
    assert alone.standard_error == pytest.approx(statistics.stdev(values) / 2)
    # samples that repeat their prompt's value add nothing
    repeated = clustered_mean([value for value in values for _ in range(3)], [3] * 4)
    assert repeated.standard_error == pytest.approx(alone.standard_error)
    assert repeated.num == 12
    assert math.isnan(clustered_mean(values, [4]).standard_error)
