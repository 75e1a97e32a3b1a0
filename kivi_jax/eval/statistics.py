"""What is noise: bootstrap confidence intervals of means and of paired differences."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
_AT_ONCE = 100  # resamples: bounds the memory of large samples


class Estimate(NamedTuple):
    """A mean and the ends of its confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def noise(self) -> bool:
        """Whether the interval holds 0: as a difference, it may be chance."""
        return self.low <= 0 <= self.high


def bootstrap(*groups: Sequence[float]) -> Estimate:
    """The mean of the groups' means, and its 95 % percentile interval over 10,000 resamples within groups.

    The resamples are always the same ones, so a report does not change from one call to the next.

    Raises:
        ValueError: there is no group, or one is empty.
    """
    if not groups or not all(len(group) for group in groups):
        raise ValueError("there is nothing to average")
    rng = np.random.default_rng(0)
    resampled = np.mean([_resampled_means(np.asarray(group, np.float64), rng) for group in groups], axis=0)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Estimate(float(np.mean([np.mean(group) for group in groups])), float(low), float(high))


def _resampled_means(sample: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    draws = (rng.integers(sample.size, size=(_AT_ONCE, sample.size)) for _ in range(RESAMPLES // _AT_ONCE))
    return np.concatenate([sample[draw].mean(1) for draw in draws])


def difference(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """`bootstrap` of values minus baseline, sample by sample.

    Raises:
        ValueError: there are not as many values as baseline values, or none.
    """
    if len(values) != len(baseline):
        raise ValueError(f"{len(values)} values cannot be paired with {len(baseline)}")
    return bootstrap([value - other for value, other in zip(values, baseline, strict=True)])
