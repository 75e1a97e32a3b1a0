"""Bootstrap intervals, against SciPy's and against their meaning."""

import numpy as np
import pytest

from kivi_jax.eval.statistics import bootstrap, difference


def test_the_interval_is_scipys():
    from scipy import stats  # 3 s, of the one worker that needs it

    values = np.random.default_rng(1).normal(3, 2, 40)
    expected = stats.bootstrap((values,), np.mean, method="percentile", rng=0).confidence_interval
    mean, low, high = bootstrap(values.tolist())
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.05)


def test_groups_count_alike_whatever_their_size():
    assert bootstrap([1.0] * 99, [0.0]).mean == 0.5


def test_equal_values_have_no_interval_and_a_paired_difference_sees_what_means_hide():
    noise = np.random.default_rng(2).normal(0, 10, 50)
    change = difference((noise + 1).tolist(), noise.tolist())
    assert change == pytest.approx((1, 1, 1))
    assert not change.noise
    assert bootstrap(noise.tolist()).noise


def test_nothing_or_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="nothing to average"):
        bootstrap([])
    with pytest.raises(ValueError, match="cannot be paired"):
        difference([1.0], [1.0, 2.0])
