"""What is noise: bootstrap confidence intervals of means and of paired differences."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean and the ends of its confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def noise(self) -> bool:
        """Whether the interval holds 0: as a difference, it may be chance."""
        return self.low <= 0 <= self.high


def bootstrap(values: Sequence[float]) -> Estimate:
    """The mean of `values` and its 95 % percentile interval over 10,000 resamples (always the same ones).

    Raises:
        ValueError: there are no values.
    """
    sample = np.asarray(values, np.float64)
    if not sample.size:
        raise ValueError("there is nothing to average")
    rng = np.random.default_rng(0)
    means = np.concatenate(
        [sample[rng.integers(sample.size, size=(100, sample.size))].mean(1) for _ in range(RESAMPLES // 100)]
    )
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Estimate(float(sample.mean()), float(low), float(high))


def difference(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """`bootstrap` of values minus baseline, sample by sample.

    Raises:
        ValueError: there are not as many values as baseline values, or none.
    """
    if len(values) != len(baseline):
        raise ValueError(f"{len(values)} values cannot be paired with {len(baseline)}")
    return bootstrap((np.asarray(values, np.float64) - np.asarray(baseline, np.float64)).tolist())
